"""Training on preferences: ORPO, DPO and SimPO on pairs of answers, KTO on rated ones.

The losses use log probabilities of whole answers by the model and by its reference. The reference of DPO and
KTO is the base, which is the same model with its adapter off, computed in the step without gradients. So no
second model is loaded, and nothing has to be stored for a resume. If a run trains an existing adapter, the
reference has that adapter in its initial state (:class:`.adapter.StartingAdapter`).

* ORPO: Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", eq. 4, 6 and 7
* DPO: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7
* SimPO: Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", eq. 6
* KTO: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", eq. 7 and 8

The reward of an answer is β times its mean log probability (ORPO, SimPO), or β times its log-ratio to the
reference (DPO, KTO). Rewards are summed while losses are computed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from qlora_tui.data.store import GOOD
from qlora_tui.recipe.preference_methods import PREFERENCE_TRAITS, PreferenceMethod
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training.adapter import StartingAdapter
from qlora_tui.training.scoring import frozen_eval, no_grad_eval


class AnswerScores(NamedTuple):
    """Log probabilities of the answers of a micro-batch, in the order of its samples."""

    log_probabilities: Tensor
    """Weighted sum over the tokens of each answer, in nats, fp32 (answers,)."""
    weights: Tensor
    """Sum of the weights of each answer's tokens, fp32 (answers,); without weights, each token counts 1."""

    @property
    def means(self) -> Tensor:
        """Return the mean log probability of a token of each answer, (answers,)."""
        return self.log_probabilities / self.weights.clamp(min=1e-6)


def score_answers(model: Any, batch: dict[str, Any]) -> AnswerScores:
    """Compute the log probability of each answer of a micro-batch on the model's device.

    Args:
        model: a model, possibly wrapped, with :func:`~qlora_tui.training.loss.use_loss`.
        batch: from :func:`.batches.collate_answers`.
    """
    inputs = {k: v for k, v in batch.items() if k not in ("sides", "answer_tokens", "loss_weights")}
    losses: Tensor = model(per_token=True, **inputs).loss
    counts: list[int] = batch["answer_tokens"]
    if not counts:
        nothing = losses.sum()[None][:0]
        return AnswerScores(nothing, nothing.detach())
    if "loss_weights" in batch:
        token_weights = batch["loss_weights"].flatten().index_select(0, batch["loss_positions"] + 1)
        losses = losses * token_weights
        weights = torch.stack([part.sum() for part in torch.split(token_weights, counts)])
    else:
        weights = torch.tensor(counts, dtype=torch.float32, device=losses.device)
    # Split instead of scattered: a sum by atomic additions would differ from run to run.
    sums = torch.stack([part.sum() for part in torch.split(losses, counts)])
    return AnswerScores(-sums, weights)


def score_with_reference(
    peft_model: Any, batch: dict[str, Any], starting: StartingAdapter | None = None
) -> Tensor:
    """Return the log probability of each answer before training, (answers,), without gradients.

    Before the first step it equals the model's to the last bit, so that rewards are exactly 0.

    Args:
        peft_model: its base with the adapter off is the reference.
        starting: the adapter that the run started from, which is then the reference on that base.
    """
    before = peft_model.disable_adapter() if starting is None else starting.in_place(peft_model)
    with before, frozen_eval(peft_model):
        return score_answers(peft_model, batch).log_probabilities


_LARGEST_LOG_PROBABILITY = -1e-7
"""Upper bound of a log probability. At 0, the answer would be certain and its odds infinite."""


def odds_ratio_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return ORPO's second term; the first term is the cross-entropy of the chosen answer.

    Args:
        chosen: mean log probability per token of each chosen answer, (pairs,).
        rejected: mean log probability per token of each rejected answer, (pairs,).
    """
    return -beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(log_probability: Tensor) -> Tensor:
    """Return log(p / (1 - p)), exact for p near 0 and near 1.

    Source: Mächler 2012, "Computing log(1 - exp(-|a|))".
    """
    x = log_probability.clamp(max=_LARGEST_LOG_PROBABILITY)
    near_one = x > -math.log(2)
    # The branch that is not selected must be finite too, or its gradient is NaN.
    large, small = torch.where(near_one, x, -1.0), torch.where(near_one, -1.0, x)
    return x - torch.where(near_one, torch.log(-torch.expm1(large)), torch.log1p(-torch.exp(small)))


def logistic_loss(chosen: Tensor, rejected: Tensor, margin: float = 0.0) -> Tensor:
    """Return -log σ(chosen - rejected - margin), which is DPO's loss, and SimPO's with a margin.

    Args:
        chosen: rewards of the chosen answers, (pairs,): β times the log-ratio to the reference, or in SimPO β
            times the mean log probability per token.
        rejected: rewards of the rejected answers, (pairs,).
        margin: SimPO's γ.
    """
    return -logsigmoid(chosen - rejected - margin)


def prospect_loss(rewards: Tensor, is_good: Tensor, moved: Tensor) -> Tensor:
    """Return KTO's loss with both weights 1: good answers should exceed the reference point, bad ones not.

    Args:
        rewards: β times the log-ratio of each answer to the reference, (answers,).
        is_good: bool, (answers,).
        moved: the reference point, a scalar: β times the estimated divergence from the reference.
    """
    distance = torch.where(is_good, rewards - moved, moved - rewards)
    return 1 - torch.sigmoid(distance)


class RewardSums(NamedTuple):
    """Sums over answers, which can be added over micro-batches and processes."""

    right: float = 0.0
    """Number of pairs whose chosen answer has the higher reward.

    For rated answers, number of good ones with rewards above KTO's reference point, and of bad ones with
    rewards not above it.
    """
    compared: float = 0.0
    """Number of pairs, or of rated answers."""
    good_reward: float = 0.0
    good: float = 0.0
    """Number of chosen or good answers."""
    bad_reward: float = 0.0
    bad: float = 0.0

    @property
    def accuracy(self) -> float | None:
        """Share of comparisons that the model gets right; None if there were none."""
        return self.right / self.compared if self.compared else None

    @property
    def margin(self) -> float | None:
        """Mean reward of good answers minus that of bad ones; None if one kind is missing."""
        if not (self.good and self.bad):
            return None
        return self.good_reward / self.good - self.bad_reward / self.bad


class PreferenceObjective:
    """Computes the loss of a preference method for a peft model."""

    def __init__(
        self,
        method: PreferenceMethod,
        beta: float,
        gamma: float,
        starting: StartingAdapter | None = None,
    ) -> None:
        """Set up the objective.

        Args:
            gamma: SimPO's margin.
            starting: the adapter that the run started from; None if it started from the base.
        """
        self.method = method
        self._traits = PREFERENCE_TRAITS[method]
        self._beta = beta
        self._gamma = gamma
        self._starting = starting
        self._moved = 0.0
        self._sums: Tensor | None = None

    @classmethod
    def of(cls, recipe: Recipe, starting: StartingAdapter | None = None) -> PreferenceObjective | None:
        """Return the objective of a recipe; None if the recipe has no preference method."""
        method = recipe.preference_method
        if method is None:
            return None
        beta = recipe.training.preference_beta or PREFERENCE_TRAITS[method].default_beta
        return cls(method, beta, recipe.training.simpo_gamma, starting)

    @property
    def needs_divergence(self) -> bool:
        """Whether :meth:`set_divergence` must be called before the losses of a step."""
        return self._traits.rates_answers

    def divergence(self, peft_model: Any, batch: dict[str, Any]) -> tuple[float, int]:
        """Return the sum of the answers' log-ratios to the reference, in nats, and the number of answers.

        The answers of ``batch`` are mismatched: each follows the prompt of another answer.
        """
        with no_grad_eval(peft_model):
            scores = score_answers(peft_model, batch).log_probabilities
            reference = score_with_reference(peft_model, batch, self._starting)
        return float((scores - reference).sum()), len(scores)

    def set_divergence(self, divergence: float) -> None:
        """Set the divergence from the reference in nats; a negative value counts as 0, as in KTO's paper."""
        self._moved = max(0.0, divergence)

    def summed_loss(self, model: Any, peft_model: Any, batch: dict[str, Any], token_share: float) -> Tensor:
        """Return the sum of the losses of a micro-batch's pairs or rated answers, an fp32 scalar.

        Args:
            model: ``peft_model``, or a wrapper such as DDP's.
            peft_model: gives the reference.
            batch: from :func:`~qlora_tui.training.batches.collate_answers`, on the device.
            token_share: number of pairs divided by number of tokens in chosen answers, over the whole step;
                the weight of a token of ORPO's cross-entropy relative to a pair.
        """
        reference = None
        if self._traits.uses_reference:
            reference = score_with_reference(peft_model, batch, self._starting)
        scores = score_answers(model, batch)
        if not batch["sides"]:
            return scores.log_probabilities.sum()
        logs = scores.log_probabilities
        rewards = self._beta * (scores.means if reference is None else logs - reference)
        if self._traits.rates_answers:
            return self._rated(rewards, batch["sides"])
        chosen, rejected = rewards[0::2], rewards[1::2]
        good, bad, pairs = chosen.detach(), rejected.detach(), torch.tensor(len(chosen))
        self._add((good > bad).sum(), pairs, good.sum(), pairs, bad.sum(), pairs)
        if self.method == "orpo":
            means = scores.means
            cross_entropy = -logs[0::2].sum() * token_share
            return cross_entropy + odds_ratio_loss(means[0::2], means[1::2], self._beta).sum()
        return logistic_loss(chosen, rejected, self._gamma if self._traits.has_margin else 0.0).sum()

    def _rated(self, rewards: Tensor, sides: list[int]) -> Tensor:
        is_good = torch.tensor([side == GOOD for side in sides], device=rewards.device)
        moved = torch.tensor(self._beta * self._moved, device=rewards.device)
        above, values = rewards.detach() > moved, rewards.detach()
        self._add(
            (above == is_good).sum(),
            torch.tensor(len(sides)),
            values[is_good].sum(),
            is_good.sum(),
            values[~is_good].sum(),
            (~is_good).sum(),
        )
        return prospect_loss(rewards, is_good, moved).sum()

    def _add(self, *values: Tensor) -> None:
        """Add to the sums on their device, without waiting for it."""
        device = values[0].device
        added = torch.stack([value.to(device, torch.float64) for value in values])
        self._sums = added if self._sums is None else self._sums + added

    def take_sums(self) -> RewardSums:
        """Return the sums since the last call, and reset them to 0."""
        sums, self._sums = self._sums, None
        return RewardSums() if sums is None else RewardSums(*sums.tolist())
