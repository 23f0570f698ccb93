"""Axes: round ranges that hold still while numbers come in, ticks, and their labels."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

DOTS_WIDE, DOTS_HIGH = 2, 4
"""Dots of a braille character, of which curves are drawn."""
_ROUND = (1.0, 2.0, 5.0)
_FAR = 1e30
_EPSILON = 1e-12
"""An axis goes no further, and no finer, so that its arithmetic stays finite."""


@dataclass(frozen=True)
class Axis:
    """An axis from ``low`` to ``high``, both shown, with its ``unit``: ``step``, ``loss``, ``tok/s``."""

    low: float
    high: float
    unit: str = ""

    def place(self, value: float, cells: int) -> int:
        """The cell that a value falls in: 0 is at ``low``; values outside are clamped to the edge."""
        share = (value - self.low) / (self.high - self.low)
        return min(max(round(share * (cells - 1)), 0), cells - 1)


def column_of(value: float, x: Axis, columns: int) -> int:
    """The column, from the left, with the dot of this value of a curve."""
    return x.place(value, columns * DOTS_WIDE) // DOTS_WIDE


def row_of(value: float, y: Axis, rows: int) -> int:
    """The row, from the top, with the dot of this value of a curve."""
    return rows - 1 - y.place(value, rows * DOTS_HIGH) // DOTS_HIGH


def rounded(low: float, high: float, ticks: int = 12, unit: str = "") -> Axis:
    """The smallest axis around these values that begins and ends at a round number.

    It moves only when a value leaves it, so that a graph holds still.
    """
    low, high = (min(max(value, -_FAR), _FAR) for value in (low, high))
    size = max(abs(low), abs(high))
    if high - low <= max(size * 1e-9, _EPSILON):
        spread = size * 0.1 if size > _EPSILON else 1.0
        low, high = low - spread, high + spread
    step = tick_step(low, high, ticks)
    return Axis(
        _clean(math.floor(low / step + 1e-9) * step), _clean(math.ceil(high / step - 1e-9) * step), unit
    )


def so_far(done: float, total: float, unit: str = "") -> Axis:
    """From 0 to the next round number of steps (1, 2, 5, 10…), at most the whole run.

    A run that began shows its first steps wide, and the axis changes a dozen times in its life.
    """
    reach = 10.0
    while reach < done:
        power = 10 ** math.floor(math.log10(reach) + 1e-9)
        reach = next(power * r for r in (*_ROUND, 10.0) if power * r > reach * 1.001)
    return Axis(0.0, min(reach, total) if total >= max(done, 1) else max(reach, 1.0), unit)


def tick_step(low: float, high: float, max_parts: int) -> float:
    """The smallest of 1, 2, 5 × 10ⁿ that divides the range into at most ``max_parts`` parts."""
    rough = (high - low) / max(1, max_parts)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * r for r in (*_ROUND, 10.0) if power * r >= rough * (1 - 1e-9))


def ticks(axis: Axis, most: int) -> list[tuple[float, str]]:
    """(value, label) of the round values of an axis, in order."""
    step = tick_step(axis.low, axis.high, most)
    first = math.ceil(axis.low / step - 1e-9)
    last = math.floor(axis.high / step + 1e-9)
    return [(_clean(i * step), label(_clean(i * step), step)) for i in range(first, last + 1)]


def label(value: float, step: float) -> str:
    """The shortest label that differs from its neighbors: ``1.25``, ``400``, ``12k``, ``1.5M``."""
    if value == 0:
        return "0"
    size = max(abs(value), step)
    for unit, letter, least in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)):
        if size >= least:
            return f"{value / unit:.{_decimals(step / unit)}f}{letter}"
    if size < 1e-3:
        return re.sub(r"\.?0*e-0?", "e-", f"{value:.2e}")
    return f"{value:,.{_decimals(step)}f}"


def _decimals(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _clean(value: float) -> float:
    # 3 × 0.1 is 0.30000000000000004; a tick is 0.3.
    return float(f"{value:.12g}")
