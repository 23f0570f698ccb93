"""Which learning rate a range test suggests: a tenth of the one at which the loss was lowest.

That is the rule of fastai's ``lr_find`` (``minimum``): above the lowest loss each step already does as much
harm as good, and the rate of a whole run has to leave room for that (Smith, arXiv 1506.01186, section 3.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, pstdev

from qlora_tui.formatting import format_float
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.lr_range import LrRange, read_lr_range, stored_path

METHOD = "a tenth of the rate with the lowest loss, as fastai's lr_find suggests (minimum / 10)"
_REACH = 2
"""Steps on each side over which the curve is averaged; fewer at its ends."""
_MIN_FALL = 0.01
"""Share of the first loss that it must fall by at least."""
_NOISE_FACTOR = 3.0
"""Multiple of the noise that it must fall by at least."""


@dataclass(frozen=True)
class RangeCurve:
    """The curve of a test, and what it suggests. All sequences have one value for each step."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    """Loss of each step as if all batches were equally hard: its difference from the untrained loss of its
    batch, plus the mean of the untrained losses.
    """
    smoothed: tuple[float, ...]
    """Each loss averaged with its neighbors."""
    start: float
    """The untrained loss, the mean over the batches."""
    lowest: int | None
    """Step with the lowest smoothed loss, from 0; None without steps."""
    suggested: float | None
    """The rate, to two digits; None where the curve gives no answer."""
    sentence: str
    """The suggestion, or why there is none and what to do."""


def read_curve(lr_range: LrRange) -> RangeCurve:
    """Compute the curve of a test and its suggestion; steps without a finite loss are left out."""
    finite = [(step, step.loss) for step in lr_range.steps if step.loss is not None]
    start = fmean(step.untrained for step in lr_range.steps) if lr_range.steps else 0.0
    losses = tuple(start + loss - step.untrained for step, loss in finite)
    smoothed = tuple(_centered_mean(losses, i) for i in range(len(losses)))
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__, default=None)
    rates = tuple(step.rate for step, _ in finite)
    problem = _no_answer(lr_range, rates, losses, smoothed, start, lowest)
    suggested = None
    if lowest is not None and not problem:
        suggested = float(f"{rates[lowest] / 10:.1e}")
        problem = (
            f"Suggested: {format_rate(suggested)}, {METHOD}. The loss fell from {format_float(start, 3)} to "
            f"{format_float(smoothed[lowest], 3)} at {format_rate(rates[lowest])}."
        )
    return RangeCurve(rates, losses, smoothed, start, lowest, suggested, problem)


def suggested_rate(recipe: Recipe) -> float | None:
    """Return what the stored test of a recipe suggests; None without a test or an answer. Never raises."""
    try:
        stored = read_lr_range(stored_path(recipe))
    except OSError:
        return None
    return None if stored is None else read_curve(stored).suggested


def format_rate(rate: float) -> str:
    """Format a learning rate: ``4.9e-4``, ``1e-3``."""
    digits, _, exponent = f"{rate:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _centered_mean(values: tuple[float, ...], i: int) -> float:
    reach = min(_REACH, i, len(values) - 1 - i)
    return fmean(values[i - reach : i + reach + 1])


def _no_answer(
    lr_range: LrRange,
    rates: tuple[float, ...],
    losses: tuple[float, ...],
    smoothed: tuple[float, ...],
    start: float,
    lowest: int | None,
) -> str:
    """Say why the curve gives no answer; empty where it does."""
    if lowest is None:
        return "No suggestion: no step has a finite loss."
    # The first rates are so low that what varies there is noise: dropout, rounding.
    first = [loss - start for loss in losses[: max(4, lr_range.settings.steps // 4)]]
    least = max(_MIN_FALL * abs(start), _NOISE_FACTOR * pstdev(first))
    fall = start - smoothed[lowest]
    if fall < least or math.isnan(fall):
        return (
            f"No suggestion: the loss did not fall clearly at any rate (by {max(fall, 0.0):.3f}; noise and "
            f"batches alone make {least:.3f}). Use more steps, or a larger batch "
            "(training.gradient_accumulation)."
        )
    if lowest >= len(smoothed) - 1 - _REACH and not lr_range.diverged:
        return (
            f"No suggestion: the loss was still falling at the highest rate, {format_rate(rates[-1])}. Let "
            "the rates rise further, or use more steps."
        )
    if rates[lowest] / 10 < lr_range.settings.low:
        return (
            f"No suggestion: the loss was lowest at {format_rate(rates[lowest])}, within the first power of "
            "ten. Begin at a lower rate."
        )
    return ""
