"""How far a run has moved from its base where it was not trained: a forgetting curve beside the loss.

``general_prompts``  the prompts
``greedy_answers``   answers to all of them at once
``answer_logits``    logits at the answers, packed into rows as training samples are
``base_answers``     the base's answers with its most likely tokens at each place, computed once for a base
                     and then cached
``answer_checks``    ends, loops, refusals and JSON, counted in answers
``base_divergence``  compares a model with them
``replay_samples``   the base's answers to ``replay_prompts`` among the training samples
"""
