"""Columns of numbers made small enough to draw: the lowest and highest of each stretch, and where it broke.

A run of a million steps is a column of a million floats; a graph is a few hundred dots wide. An
:class:`Envelope` keeps the extremes of each block as the column grows, so that any stretch of it is thinned
in a millisecond. What is drawn is a :class:`Trace`, which holds no more points than a wide screen has dots.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MOST_POINTS = 640
"""Of a trace: more than any terminal is dots wide."""
_BLOCK = 128


@dataclass(frozen=True)
class Trace:
    """A curve ready to be drawn. Each point stands for one value, or for a stretch of them."""

    xs: tuple[float, ...] = ()
    lows: tuple[float, ...] = ()
    """Lowest finite value of the stretch; ``inf`` where it has none."""
    highs: tuple[float, ...] = ()
    """Highest finite value of the stretch; ``-inf`` where it has none."""
    broken: tuple[bool, ...] = ()
    """Whether a value of the stretch was NaN or infinite."""

    @property
    def low(self) -> float | None:
        """Of all finite values."""
        return min((low for low in self.lows if low < math.inf), default=None)

    @property
    def high(self) -> float | None:
        return max((high for high in self.highs if high > -math.inf), default=None)


class Envelope:
    """The extremes of a column that grows at its end."""

    def __init__(self, column: array[float]) -> None:
        self._column = column
        self._lows = array("d")
        self._highs = array("d")
        self._broken = bytearray()
        self._known: dict[tuple[int, int], tuple[float, float, bool]] = {}
        """What was found for the stretches of the last trace: all but its end stay as they are."""

    def grow(self) -> None:
        """Take in what was appended to the column, or cut off it."""
        blocks = len(self._column) // _BLOCK
        if blocks < len(self._lows):
            self.forget_from(blocks * _BLOCK)
        for block in range(len(self._lows), blocks):
            low, high, broken = extremes(self._column[block * _BLOCK : (block + 1) * _BLOCK])
            self._lows.append(low)
            self._highs.append(high)
            self._broken.append(broken)

    def forget_from(self, index: int) -> None:
        """Values from ``index`` on have been replaced."""
        keep = max(0, index) // _BLOCK
        del self._lows[keep:], self._highs[keep:], self._broken[keep:]
        self._known = {}

    def between(self, start: int, end: int) -> tuple[float, float, bool]:
        """Lowest, highest and whether broken, of ``column[start:end]``."""
        first, last = -(-start // _BLOCK), end // _BLOCK
        if last <= first or last > len(self._lows):
            return extremes(self._column[start:end])
        parts = [
            extremes(self._column[start : first * _BLOCK]),
            (min(self._lows[first:last]), max(self._highs[first:last]), any(self._broken[first:last])),
            extremes(self._column[last * _BLOCK : end]),
        ]
        lows, highs, broken = zip(*parts, strict=True)
        return min(lows), max(highs), any(broken)

    def trace(
        self,
        xs: Sequence[float],
        low: float = -math.inf,
        high: float = math.inf,
        most: int = MOST_POINTS,
    ) -> Trace:
        """The part between two values of ``xs`` (ascending, as long as the column), thinned."""
        start, end = bisect_left(xs, low), min(bisect_right(xs, high), len(self._column))
        if end <= start:
            return Trace()
        # Stretches begin at multiples of their length, so that a growing curve keeps the ones it has.
        length = 1 << max(0, math.ceil(math.log2((end - start) / most)))
        edges = [start, *range((start // length + 1) * length, end, length), end]
        spans = list(pairwise(edges))
        known = self._known
        self._known = {span: known.get(span) or self.between(*span) for span in spans}
        lows, highs, broken = zip(*self._known.values(), strict=True)
        return Trace(tuple(float(xs[(a + b - 1) // 2]) for a, b in spans), lows, highs, broken)


def extremes(values: Sequence[float]) -> tuple[float, float, bool]:
    """Lowest and highest finite value, and whether any was not finite."""
    if not values:
        return math.inf, -math.inf, False
    # A sum is finite only where every value is: three passes in C instead of a loop here.
    if math.isfinite(sum(values)):
        return min(values), max(values), False
    finite = [value for value in values if math.isfinite(value)]
    broken = len(finite) < len(values)
    return min(finite, default=math.inf), max(finite, default=-math.inf), broken


class Smoother:
    """A running mean of a column that grows at its end, as a column of its own.

    Exponential, without the pull of a made-up start: ``m += (x - m) · (1 - β) / (1 - βⁿ)``, the bias
    correction of Adam (Kingma and Ba 2015, section 3). What is not finite is passed over.
    """

    def __init__(self, column: array[float], window: float = 20.0) -> None:
        self.column = array("d")
        """NaN before the first finite value."""
        self._source = column
        self._window = window
        """In values: β = 1 - 1 / window."""
        self._mean = math.nan
        self._decay = 1.0

    def grow(self) -> None:
        """Take in what was appended to the source."""
        mean, decay, beta = self._mean, self._decay, 1 - 1 / self._window
        append = self.column.append
        for value in self._source[len(self.column) :]:
            if math.isfinite(value):
                decay *= beta
                mean = value if mean != mean else mean + (value - mean) * (1 - beta) / (1 - decay)
            append(mean)
        self._mean, self._decay = mean, decay

    def over(self, window: float) -> bool:
        """Smooth over so many values; True where that is another number and all is reckoned anew."""
        if window == self._window:
            return False
        self._window = window
        self.restart()
        return True

    def restart(self) -> None:
        """Values were replaced: begin again from the first."""
        del self.column[:]
        self._mean, self._decay = math.nan, 1.0
