"""Columns of numbers, decimated for drawing: minimum and maximum of each stretch, and whether it contains
NaN.

A graph is a few hundred dots wide, but a run may take weeks. A :class:`DecimatedSeries` takes values as they
arrive and keeps what a graph can show: the last few hundred individually, earlier ones in stretches of two,
of four, and so on. Graphs draw an :class:`Envelope`, which has no more points than a wide screen has dots.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import or_

MAX_POINTS = 640
"""Maximum number of points in an envelope: about the number of dots across a wide terminal."""


@dataclass(frozen=True)
class Envelope:
    """A curve ready to draw. Each point is a single value or a stretch of values."""

    xs: tuple[float, ...] = ()
    """The x at which each stretch ends."""
    lows: tuple[float, ...] = ()
    """Lowest finite value of each stretch; ``inf`` if it has none."""
    highs: tuple[float, ...] = ()
    """Highest finite value of each stretch; ``-inf`` if it has none."""
    broken: tuple[bool, ...] = ()
    """Whether the stretch contains NaN or infinity."""

    @classmethod
    def of_points(cls, xs: Sequence[float], values: Sequence[float]) -> Envelope:
        """Return a curve through single values, interrupted at each value that is not finite."""
        broken = tuple(not math.isfinite(value) for value in values)
        lows = tuple(math.inf if bad else value for value, bad in zip(values, broken, strict=True))
        highs = tuple(-math.inf if bad else value for value, bad in zip(values, broken, strict=True))
        return cls(tuple(xs), lows, highs, broken)

    @property
    def low(self) -> float | None:
        """Lowest finite value; None if there are none."""
        return min((low for low in self.lows if low < math.inf), default=None)

    @property
    def high(self) -> float | None:
        return max((high for high in self.highs if high > -math.inf), default=None)


class DecimatedSeries:
    """Columns over a common x that grow at the end. Memory grows with the logarithm of their length."""

    def __init__(self, columns: int = 1, most: int = MAX_POINTS) -> None:
        self._most = most
        self._first = math.inf
        """The x of the first value."""
        self._levels = [_Level(columns)]
        """Levels with stretches of 1, 2, 4, 8… values. Each level keeps its most recent stretches."""

    def __len__(self) -> int:
        return self._levels[0].count

    def extend(self, xs: Sequence[float], *columns: Sequence[float]) -> None:
        """Append values.

        ``xs`` must ascend and continue from the last; all columns must have the same length.
        """
        if len(xs) and not len(self):
            self._first = xs[0]
        self._levels[0].extend(xs, [_Extremes.of(values) for values in columns])
        for number, level in enumerate(self._levels, 1):
            if level.count <= self._most:
                break
            if number == len(self._levels):
                self._levels.append(_Level(len(columns)))
            level.pair_into(self._levels[number])
            level.shorten(self._most)

    def envelopes(self, low: float = -math.inf) -> list[Envelope]:
        """Return each column from ``low`` on, in the shortest stretches that fit.

        A stretch that may contain values before ``low`` is left out; that is at most a dot or two.
        """
        number, start = self._resolution(low)
        level = self._levels[number]
        # The newest values do not fill a stretch of this length yet. They are in the shorter levels: each
        # level with an odd count has one stretch that is not yet in a longer level. All of them are drawn as
        # one stretch.
        rest = [shorter for shorter in self._levels[:number] if shorter.count % 2]
        xs = tuple(level.xs[start:])
        if rest:
            xs += (self._levels[0].xs[-1],)
        envelopes = []
        for place, column in enumerate(level.columns):
            shown = column.part(start)
            if rest:
                shown.extend(_Extremes.over([shorter.columns[place].part(-1) for shorter in rest]))
            envelopes.append(
                Envelope(xs, tuple(shown.lows), tuple(shown.highs), tuple(map(bool, shown.broken)))
            )
        return envelopes

    def _resolution(self, low: float) -> tuple[int, int]:
        """Return the index of the finest level that has few enough stretches from ``low`` on, and the index
        of the first of those stretches.
        """
        for number, level in enumerate(self._levels):
            start = bisect_left(level.xs, low)
            # A level that has dropped stretches still has more than enough, and begins before the first one
            # drawn.
            if len(level.xs) - start <= self._most:
                return number, start + (number > 0 and low > self._first)
        raise AssertionError("the last level has all there is")


@dataclass
class _Extremes:
    """A column's stretches of a given length."""

    lows: array[float] = field(default_factory=lambda: array("d"))
    highs: array[float] = field(default_factory=lambda: array("d"))
    broken: bytearray = field(default_factory=bytearray)

    @classmethod
    def of(cls, values: Sequence[float]) -> _Extremes:
        """Return each value as a stretch of its own."""
        # A sum is finite only if every value is: one pass in C instead of a Python loop.
        if math.isfinite(sum(values)):
            return cls(array("d", values), array("d", values), bytearray(len(values)))
        finite = [math.isfinite(value) for value in values]
        return cls(
            array("d", (v if good else math.inf for v, good in zip(values, finite, strict=True))),
            array("d", (v if good else -math.inf for v, good in zip(values, finite, strict=True))),
            bytearray(not good for good in finite),
        )

    @classmethod
    def over(cls, parts: Sequence[_Extremes]) -> _Extremes:
        """Merge all parts into one stretch."""
        return cls(
            array("d", [min(low for part in parts for low in part.lows)]),
            array("d", [max(high for part in parts for high in part.highs)]),
            bytearray([any(any(part.broken) for part in parts)]),
        )

    def extend(self, more: _Extremes) -> None:
        self.lows.extend(more.lows)
        self.highs.extend(more.highs)
        self.broken.extend(more.broken)

    def part(self, start: int) -> _Extremes:
        return _Extremes(self.lows[start:], self.highs[start:], self.broken[start:])

    def pairs(self, start: int, end: int) -> _Extremes:
        """Merge each pair of stretches into one."""
        one, other = slice(start, end, 2), slice(start + 1, end, 2)
        return _Extremes(
            array("d", map(min, self.lows[one], self.lows[other])),
            array("d", map(max, self.highs[one], self.highs[other])),
            bytearray(map(or_, self.broken[one], self.broken[other])),
        )

    def drop(self, count: int) -> None:
        del self.lows[:count], self.highs[:count], self.broken[:count]


class _Level:
    """The most recent stretches of a given length, for every column."""

    def __init__(self, columns: int) -> None:
        self.xs = array("d")
        self.columns = [_Extremes() for _ in range(columns)]
        self.dropped = 0

    @property
    def count(self) -> int:
        """Number of values ever appended."""
        return self.dropped + len(self.xs)

    def extend(self, xs: Sequence[float], columns: Sequence[_Extremes]) -> None:
        if any(len(more.lows) != len(xs) for more in columns):
            raise ValueError("a column is not as long as xs")
        self.xs.extend(array("d", xs))
        for column, more in zip(self.columns, columns, strict=True):
            column.extend(more)

    def pair_into(self, longer: _Level) -> None:
        """Pass each new pair of stretches on to the level with stretches twice as long."""
        start = 2 * longer.count - self.dropped
        end = start + (len(self.xs) - start) // 2 * 2
        longer.extend(self.xs[start + 1 : end : 2], [column.pairs(start, end) for column in self.columns])

    def shorten(self, most: int) -> None:
        """Drop the oldest stretches, but only once there are twice as many as needed, so that this
        is rare.
        """
        if len(self.xs) <= 2 * most:
            return
        over = len(self.xs) - (most + 1)
        del self.xs[:over]
        for column in self.columns:
            column.drop(over)
        self.dropped += over


class BiasCorrectedEma:
    """An exponential moving average with bias correction.

    The update is ``m += (x - m) · (1 - β) / (1 - βⁿ)``, the bias correction of Adam (Kingma and Ba 2015,
    section 3). Values that are not finite are skipped.
    """

    def __init__(self, window: float = 20.0) -> None:
        self.window = window
        """Number of values that the mean averages over: β = 1 - 1 / window."""
        self.mean = math.nan
        """NaN before the first finite value."""
        self._decay = 1.0

    def smooth(self, values: Sequence[float]) -> array[float]:
        """Return the mean after each of these values."""
        mean, decay, beta = self.mean, self._decay, 1 - 1 / self.window
        smoothed = array("d")
        for value in values:
            if math.isfinite(value):
                decay *= beta
                mean = value if mean != mean else mean + (value - mean) * (1 - beta) / (1 - decay)
            smoothed.append(mean)
        self.mean, self._decay = mean, decay
        return smoothed


_MIN_WINDOW, _MAX_WINDOW = 4, 100


def smoothing_window(total_steps: int) -> float:
    """Return the number of steps that the running mean averages over: a thirtieth of the run, so that its
    trend shows.
    """
    return float(min(max(total_steps / 30, _MIN_WINDOW), _MAX_WINDOW))
