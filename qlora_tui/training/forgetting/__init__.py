"""How far a run has moved from its base where it was not trained: a forgetting curve beside the loss.

``general_prompts`` are the prompts, ``base_answers`` the base's answers to them with its most likely tokens
at each place, computed once for a base and then cached, and ``base_divergence`` compares a model with them.
"""
