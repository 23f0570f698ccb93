"""Costs of several sequence lengths: memory from the estimate, and time from the speed of earlier runs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.data.dataset_report import Lengths, Report
from qlora_tui.errors import UserError
from qlora_tui.memory import Verdict, check_fit, estimate
from qlora_tui.recipe.fields import fields, replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.doctor import Machine
from qlora_tui.runs.expected_time import expected_time

if TYPE_CHECKING:
    from qlora_tui.memory.budget import MemoryBudget


@dataclass(frozen=True)
class LengthCost:
    """The cost of one sequence length."""

    name: str
    """``half``, ``90%``, ``99%`` or ``all``: the share of samples that fit; ``now``: the recipe's length."""
    length: int
    whole: float
    """Share of the samples that would not be truncated."""
    verdict: Verdict | None
    """Verdict on the memory; None without a model."""
    seconds: float | None
    """Training time; None if unknown."""


def length_costs(
    report: Report,
    recipe: Recipe,
    architecture: Architecture | UserError,
    budget: MemoryBudget,
    machine: Machine,
) -> list[LengthCost]:
    """Return the costs of the recipe's own length and of the data's percentiles. Takes milliseconds per
    length.

    Args:
        report: Report on the data, with the lengths of samples.
        recipe: Recipe whose length varies.
        architecture: Architecture of the model, or the error that prevents reading it.
        budget: Memory that each length is compared with.
        machine: Machine that would train, which determines the time.
    """
    stats = report.lengths
    if not stats.count or not report.template:
        return []
    percentiles = {"half": stats.p50, "90%": stats.p90, "99%": stats.p99, "all": stats.longest}
    lengths = {name: _allowed(length) for name, length in percentiles.items()}
    lengths["now"] = recipe.data.max_length
    costs = []
    for name, length in sorted(lengths.items(), key=lambda item: (item[1], item[0] != "now")):
        changed = replace_setting(recipe, "data.max_length", length)
        verdict = time = None
        if isinstance(architecture, Architecture):
            with suppress(UserError):
                verdict = check_fit(estimate(changed, architecture, device=budget.device), budget.bytes)
            time = expected_time(changed, architecture, machine, _tokens(stats, changed))
        whole, seconds = share_within(stats, length), time.seconds if time else None
        costs.append(LengthCost(name, length, whole, verdict, seconds))
    return costs


def share_within(lengths: Lengths, limit: int) -> float:
    """Return the share of samples with up to ``limit`` tokens, interpolated within the histogram's bins."""
    if not lengths.count or limit >= lengths.longest:
        return 1.0
    at_least = max((count for length, count in lengths.within if length <= limit), default=0)
    at_most = min((count for length, count in lengths.within if length >= limit), default=lengths.count)
    inside = sum(count * min(1.0, part) for count, part in _parts(lengths, limit))
    return min(max(inside, at_least), at_most) / lengths.count


def _parts(lengths: Lengths, limit: int) -> list[tuple[int, float]]:
    """Return (count, fraction below ``limit``) for each bin. The fraction exceeds 1 if ``limit`` is above the
    bin.
    """
    parts, low = [], 0
    for bin_ in lengths.histogram:
        parts.append((bin_.count, max(0.0, (limit - low) / (bin_.up_to - low))))
        low = bin_.up_to
    return parts


def _tokens(lengths: Lengths, recipe: Recipe) -> float:
    """Return the number of tokens that a whole run would read at the recipe's length."""
    limit, total, low = recipe.data.max_length, 0.0, 0
    everything = lengths.mean * lengths.count
    for bin_ in lengths.histogram:
        middle = (low + bin_.up_to) / 2
        low = bin_.up_to
        truncated = 0.0 if middle > limit and recipe.data.overflow == "drop" else min(middle, limit)
        total += bin_.count * (middle if recipe.data.overflow == "split" else truncated)
    validation_share = 0.0 if recipe.data.validation_path else recipe.data.validation_fraction
    return min(total, everything) * recipe.training.epochs * (1 - validation_share)


def _allowed(length: int) -> int:
    field = fields()["data.max_length"]
    return min(max(length, int(field.minimum or 1)), int(field.maximum or length))
