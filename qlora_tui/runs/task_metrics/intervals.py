"""Confidence intervals at 95 % for shares, means, and the difference of two values on the same rows.

Shares: Wilson's score interval. The difference of two paired shares has Newcombe's interval from two Wilson
intervals (method 10 of Newcombe 1998, "Improved confidence intervals for the difference between binomial
proportions based on paired data"), and McNemar's exact test. Means: the paired bootstrap over rows. Its
percentiles are expanded, since resampling few rows underestimates the spread (Hesterberg 2015, "What Teachers
Should Know About the Bootstrap", section 3.3): by sqrt(n / (n - 1)), and by Student's t over z.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

MIN_ROWS = 6
"""Number of rows below which no difference is claimed: even if all of five rows change in the same
direction, this may be chance.
"""
_Z = 1.959964
"""97.5 % quantile of the standard normal distribution."""
_RESAMPLES = 2000
_SEED = 0


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def share_interval(successes: int, total: int) -> Interval:
    """Return Wilson's interval of a share; the whole range if ``total`` is 0."""
    if not total:
        return Interval(0.0, 1.0)
    share, z2 = successes / total, _Z * _Z / total
    center = (share + z2 / 2) / (1 + z2)
    half = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total)) / (1 + z2)
    # Rounding must not exclude the share itself.
    return Interval(max(0.0, min(share, center - half)), min(1.0, max(share, center + half)))


def paired_share_interval(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """Return Newcombe's interval of the share of ``second`` minus that of ``first``, on the same rows."""
    total = len(first)
    if not total:
        return Interval(-1.0, 1.0)
    both = sum(a and b for a, b in zip(first, second, strict=True))
    in_first, in_second = sum(first), sum(second)
    neither = total - in_first - in_second + both
    spread = in_first * in_second * (total - in_first) * (total - in_second)
    correlation = 0.0
    if spread:
        product = both * neither - (in_second - both) * (in_first - both)
        corrected = max(product - total / 2, 0.0) if product > 0 else product
        correlation = corrected / math.sqrt(spread)
    p1, p2 = in_first / total, in_second / total
    low1, high1 = share_interval(in_first, total)
    low2, high2 = share_interval(in_second, total)
    below, above = p2 - low2, high2 - p2
    down, up = p1 - low1, high1 - p1
    difference = p2 - p1
    return Interval(
        difference - math.sqrt(max(0.0, below**2 - 2 * correlation * below * up + up**2)),
        difference + math.sqrt(max(0.0, above**2 - 2 * correlation * above * down + down**2)),
    )


def mcnemar_p(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Return the two-sided p-value of McNemar's exact test for equality of both shares."""
    pairs = list(zip(first, second, strict=True))
    gained, lost = sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs)
    changed = gained + lost
    tail = sum(math.comb(changed, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / (1 << changed))


def mean_interval(values: Sequence[float], weights: Sequence[float] | None = None) -> Interval:
    """Return the bootstrap interval of the weighted mean of values over rows.

    Args:
        values: One value for each row. To compare two models, pass their differences.
        weights: Weight of each row, such as its number of tokens; None for equal weights.
    """
    rows = len(values)
    if rows < 2:
        return Interval(-math.inf, math.inf)
    weighed = [1.0] * rows if weights is None else list(weights)
    products = [value * weight for value, weight in zip(values, weighed, strict=True)]
    mean = sum(products) / sum(weighed)
    draw = random.Random(_SEED)
    numbers, means = list(range(rows)), []
    for _ in range(_RESAMPLES):
        if weights is None:
            means.append(sum(draw.choices(products, k=rows)) / rows)
            continue
        chosen = draw.choices(numbers, k=rows)
        weight = sum(map(weighed.__getitem__, chosen)) or 1.0
        means.append(sum(map(products.__getitem__, chosen)) / weight)
    means.sort()
    widened = math.sqrt(rows / (rows - 1)) * _student_t(rows - 1) / _Z
    edge = round(0.025 * _RESAMPLES)
    low, high = means[edge], means[_RESAMPLES - 1 - edge]
    return Interval(mean + (low - mean) * widened, mean + (high - mean) * widened)


def _student_t(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, by its expansion (Abramowitz and Stegun, 26.7.5)."""
    z = _Z
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
