"""The losses of preference methods, from log-probabilities of whole answers.

All take and return fp32 tensors of (answers,), one loss for each pair or rated answer:

* ORPO: Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", eq. 4, 6 and 7
* DPO: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7
* SimPO: Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", eq. 6
* KTO: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", eq. 7 and 8
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from qlora_tui.recipe.schema import PreferenceMethod, Recipe

_DEFAULT_BETA: dict[PreferenceMethod, float] = {"orpo": 0.1, "dpo": 0.1, "simpo": 2.0, "kto": 0.1}
_LARGEST_LOG_PROBABILITY = -1e-7
"""At 0, a certain answer, the odds would be infinite."""


def beta_of(recipe: Recipe) -> float:
    """The recipe's ``training.preference_beta``, or where it is 0 that of the method's paper."""
    method = recipe.preference_method
    assert method is not None
    return recipe.training.preference_beta or _DEFAULT_BETA[method]


def odds_ratio_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """ORPO's second term; the first is the cross-entropy of the chosen answer.

    Args:
        chosen: mean log-probability of each token of the chosen answers, (pairs,).
        rejected: mean log-probability of each token of the rejected answers, (pairs,).
    """
    return -beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(log_probability: Tensor) -> Tensor:
    """log(p / (1 - p)), exact for p near 0 and near 1 (Mächler 2012, "Computing log(1 - exp(-|a|))")."""
    x = log_probability.clamp(max=_LARGEST_LOG_PROBABILITY)
    near_one = x > -math.log(2)
    # The branch that is not taken must be finite too, or its gradient is NaN.
    large, small = torch.where(near_one, x, -1.0), torch.where(near_one, -1.0, x)
    return x - torch.where(near_one, torch.log(-torch.expm1(large)), torch.log1p(-torch.exp(small)))


def logistic_loss(chosen: Tensor, rejected: Tensor, margin: float = 0.0) -> Tensor:
    """-log σ(chosen - rejected - margin): the loss of DPO, and with a margin that of SimPO.

    Args:
        chosen: rewards of the chosen answers, (pairs,): β times the log-ratio to the reference, or in SimPO
            β times the mean log-probability of each token.
        rejected: rewards of the rejected answers, (pairs,).
        margin: SimPO's γ.
    """
    return -logsigmoid(chosen - rejected - margin)


def prospect_loss(rewards: Tensor, is_good: Tensor, moved: Tensor) -> Tensor:
    """KTO's loss with both weights 1: a good answer should be above the reference point, a bad one below.

    Args:
        rewards: β times the log-ratio of each answer to the reference, (answers,).
        is_good: bool, (answers,).
        moved: the reference point, a scalar: β times the estimated divergence from the reference.
    """
    distance = torch.where(is_good, rewards - moved, moved - rewards)
    return 1 - torch.sigmoid(distance)
