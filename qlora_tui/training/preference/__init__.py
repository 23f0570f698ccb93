"""Training on preferences: ORPO, DPO and SimPO on pairs of answers, KTO on rated ones.

``pairs``              the two sides of a pair as samples that stay together in every plan
``preference_losses``  the formulas, from log-probabilities of whole answers
``answer_scores``      these log-probabilities, with the adapter or without it
``mismatched``         answers after other prompts, from which KTO estimates how far the model has moved
``objective``          the loss of a micro-batch, with the formula of the recipe's method, and how often and
                       how clearly the better answer wins
``preference_steps``   what the trainer is given for each step; ``preference_validation``: the same loss on
                       the validation data

The reference of DPO and KTO is the base: the same model with its adapter off, computed in the step, without
gradients. So no second model is loaded, and nothing has to be kept for a resume. Where an adapter is trained
further, it is that adapter as it was (``starting_adapter``).
"""
