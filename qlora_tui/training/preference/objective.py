"""The loss of a micro-batch under a preference method, and how often and how clearly the better answer wins.

A reward is how much a model likes an answer: β times its mean log-probability (ORPO, SimPO) or β times its
log-ratio to the base (DPO, KTO). Rewards are counted while losses are computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_tui.data.store import GOOD
from qlora_tui.recipe.schema import PreferenceMethod, Recipe
from qlora_tui.training.eval_mode import no_grad_eval
from qlora_tui.training.preference.answer_scores import score_answers, score_with_reference
from qlora_tui.training.preference.preference_losses import (
    beta_of,
    logistic_loss,
    odds_ratio_loss,
    prospect_loss,
)
from qlora_tui.training.preference.starting_adapter import StartingAdapter


class RewardSums(NamedTuple):
    """Sums over answers, which can be added over micro-batches and processes."""

    right: float = 0.0
    """Pairs whose chosen answer has the higher reward; rated answers on their side of the reference point."""
    compared: float = 0.0
    """Pairs, or rated answers."""
    good_reward: float = 0.0
    good: float = 0.0
    """Chosen or good answers."""
    bad_reward: float = 0.0
    bad: float = 0.0

    @property
    def accuracy(self) -> float | None:
        """Share of comparisons that the model gets right; None where there were none."""
        return self.right / self.compared if self.compared else None

    @property
    def margin(self) -> float | None:
        """Mean reward of good answers less that of bad ones; None where one kind is missing."""
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
        """
        Args:
            gamma: SimPO's margin.
            starting: the adapter that the run started from; None where it started from the base.
        """
        self.method = method
        self._beta = beta
        self._gamma = gamma
        self._starting = starting
        self._moved = 0.0
        self._sums: Tensor | None = None

    @classmethod
    def of(cls, recipe: Recipe, starting: StartingAdapter | None = None) -> PreferenceObjective | None:
        """The objective of a recipe; None where it trains on answers alone."""
        method = recipe.preference_method
        return None if method is None else cls(method, beta_of(recipe), recipe.training.simpo_gamma, starting)

    @property
    def needs_divergence(self) -> bool:
        """Whether :meth:`set_divergence` is called before the losses of a step."""
        return self.method == "kto"

    def divergence(self, peft_model: Any, batch: dict[str, Any]) -> tuple[float, int]:
        """Sum of the log-ratios of mismatched answers to the base, in nats, and their number."""
        with no_grad_eval(peft_model):
            scores = score_answers(peft_model, batch).log_probabilities
            reference = score_with_reference(peft_model, batch, self._starting)
        return float((scores - reference).sum()), len(scores)

    def set_divergence(self, divergence: float) -> None:
        """Set the divergence from the base in nats; a negative estimate counts as 0, as in KTO's paper."""
        self._moved = max(0.0, divergence)

    def summed_loss(self, model: Any, peft_model: Any, batch: dict[str, Any], token_share: float) -> Tensor:
        """Sum of the losses of a micro-batch's pairs or rated answers, an fp32 scalar.

        Args:
            model: ``peft_model``, or a wrapper such as DDP's.
            peft_model: gives the reference.
            batch: from :func:`~qlora_tui.training.preference.answer_scores.collate_answers`, on the device.
            token_share: pairs divided by tokens of chosen answers, of the whole step: what a token of ORPO's
                cross-entropy counts beside a pair.
        """
        reference = None
        if self.method in ("dpo", "kto"):
            reference = score_with_reference(peft_model, batch, self._starting)
        scores = score_answers(model, batch)
        if not batch["sides"]:
            return scores.log_probabilities.sum()
        logs = scores.log_probabilities
        rewards = self._beta * (scores.means if reference is None else logs - reference)
        if self.method == "kto":
            return self._rated(rewards, batch["sides"])
        chosen, rejected = rewards[0::2], rewards[1::2]
        self._count_pairs(chosen.detach(), rejected.detach())
        if self.method == "orpo":
            means = scores.means
            cross_entropy = -logs[0::2].sum() * token_share
            return cross_entropy + odds_ratio_loss(means[0::2], means[1::2], self._beta).sum()
        return logistic_loss(chosen, rejected, self._gamma if self.method == "simpo" else 0.0).sum()

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

    def _count_pairs(self, chosen: Tensor, rejected: Tensor) -> None:
        pairs = torch.tensor(len(chosen))
        self._add((chosen > rejected).sum(), pairs, chosen.sum(), pairs, rejected.sum(), pairs)

    def _add(self, *values: Tensor) -> None:
        """Add to the sums on their device, which is not waited for."""
        device = values[0].device
        added = torch.stack([value.to(device, torch.float64) for value in values])
        self._sums = added if self._sums is None else self._sums + added

    def take_sums(self) -> RewardSums:
        """The sums since the last call, which are then 0."""
        sums, self._sums = self._sums, None
        return RewardSums() if sums is None else RewardSums(*sums.tolist())
