"""Series of numbers, decimated for drawing. Consecutive values are merged into buckets. A bucket has a
minimum, a maximum, and a flag for values that are not finite.

A graph is a few hundred dots wide, but a run can have millions of steps. A :class:`DecimatedSeries` takes
values as they arrive. It keeps the last few hundred values individually, and older values in buckets of two,
of four, and so on. Graphs draw an :class:`Envelope`, which has no more points than a wide screen has dots.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import add, or_

NOT_A_NUMBER = "×"
"""Symbol of a value that is not finite."""
MAX_POINTS = 640
"""Maximum number of points in an envelope: about the number of dots across a wide terminal."""


@dataclass(frozen=True)
class Envelope:
    """A curve ready to draw. Each point is a bucket of one or more consecutive values."""

    xs: tuple[float, ...] = ()
    """The x of the last value of each bucket."""
    lows: tuple[float, ...] = ()
    """Lowest finite value of each bucket; ``inf`` if the bucket has no finite value."""
    highs: tuple[float, ...] = ()
    """Highest finite value of each bucket; ``-inf`` if the bucket has no finite value."""
    broken: tuple[bool, ...] = ()
    """Whether each bucket contains NaN or infinity."""
    means: tuple[float, ...] = ()
    """Mean of the finite values of each bucket; NaN if the bucket has no finite value. Empty for a curve that
    was not decimated.
    """

    @classmethod
    def of_points(cls, xs: Sequence[float], values: Sequence[float]) -> Envelope:
        """Return a curve through single values, interrupted at each value that is not finite."""
        broken = tuple(not math.isfinite(value) for value in values)
        lows = tuple(math.inf if bad else value for value, bad in zip(values, broken, strict=True))
        highs = tuple(-math.inf if bad else value for value, bad in zip(values, broken, strict=True))
        return cls(tuple(xs), lows, highs, broken)

    @property
    def low(self) -> float | None:
        """Lowest finite value of the curve; None if the curve has no finite value."""
        return min((low for low in self.lows if low < math.inf), default=None)

    @property
    def high(self) -> float | None:
        return max((high for high in self.highs if high > -math.inf), default=None)


class DecimatedSeries:
    """Several columns of values with the same x values. Values can be appended. Memory grows with the
    logarithm of the number of values.
    """

    def __init__(self, columns: int = 1, most: int = MAX_POINTS) -> None:
        self._most = most
        self._first = math.inf
        """The x of the first value."""
        self._levels = [_Level(columns)]
        """Levels with buckets of 1, 2, 4, 8 and so on values. Each level keeps its most recent buckets."""

    def __len__(self) -> int:
        return self._levels[0].count

    def extend(self, xs: Sequence[float], *columns: Sequence[float]) -> None:
        """Append values to all columns.

        ``xs`` must be in ascending order, and continue from the last x. Each of ``columns`` must have as many
        values as ``xs``.
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
        """Return the envelope of each column of values, without the values at an x below ``low``.

        An envelope has one point for each bucket. The buckets are the smallest for which the envelope does
        not exceed the maximum number of points. The newest values can add one point, because they do not
        always fill a bucket. A bucket that may contain values before ``low`` is left out, so the curve can
        begin a dot or two later.
        """
        number, start = self._resolution(low)
        level = self._levels[number]
        # The newest values do not fill a bucket of this level yet. They are in the levels with smaller
        # buckets: each such level with an odd count has one bucket that is not yet part of a larger one.
        # These buckets are drawn as a single point.
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
                Envelope(
                    xs, tuple(shown.lows), tuple(shown.highs), tuple(map(bool, shown.broken)), shown.means()
                )
            )
        return envelopes

    def _resolution(self, low: float) -> tuple[int, int]:
        """Return (level, bucket): the index of the level to draw, and the index of its first bucket to draw.
        The level is the finest one in which the number of buckets that end at or after ``low`` is at most
        the maximum number of points.
        """
        for number, level in enumerate(self._levels):
            start = bisect_left(level.xs, low)
            # A level that has dropped buckets still has more than ``self._most``. If it has dropped buckets
            # from ``low`` on, all its buckets are after ``low``, so it does not meet this condition.
            if len(level.xs) - start <= self._most:
                return number, start + (number > 0 and low > self._first)
        raise AssertionError("the last level has all there is")


@dataclass
class _Extremes:
    """The buckets of one column in one level: lowest and highest value of each bucket, whether the bucket has
    values that are not finite, and the sum and the number of its finite values.
    """

    lows: array[float] = field(default_factory=lambda: array("d"))
    highs: array[float] = field(default_factory=lambda: array("d"))
    broken: bytearray = field(default_factory=bytearray)
    sums: array[float] = field(default_factory=lambda: array("d"))
    counts: array[float] = field(default_factory=lambda: array("d"))

    @classmethod
    def of(cls, values: Sequence[float]) -> _Extremes:
        """Return a bucket for each value."""
        # A sum is finite only if every value is finite. Checking it takes one pass in C instead of a loop in
        # Python.
        if math.isfinite(sum(values)):
            lows, highs, sums = (array("d", values) for _ in range(3))
            return cls(lows, highs, bytearray(len(values)), sums, array("d", [1.0]) * len(values))
        finite = [math.isfinite(value) for value in values]
        return cls(
            array("d", (v if good else math.inf for v, good in zip(values, finite, strict=True))),
            array("d", (v if good else -math.inf for v, good in zip(values, finite, strict=True))),
            bytearray(not good for good in finite),
            array("d", (v if good else 0.0 for v, good in zip(values, finite, strict=True))),
            array("d", map(float, finite)),
        )

    @classmethod
    def over(cls, parts: Sequence[_Extremes]) -> _Extremes:
        """Merge all buckets of all parts, and return the result as one bucket."""
        return cls(
            array("d", [min(low for part in parts for low in part.lows)]),
            array("d", [max(high for part in parts for high in part.highs)]),
            bytearray([any(any(part.broken) for part in parts)]),
            array("d", [sum(sum(part.sums) for part in parts)]),
            array("d", [sum(sum(part.counts) for part in parts)]),
        )

    def means(self) -> tuple[float, ...]:
        """Return the mean of each bucket's finite values; NaN for a bucket without finite values."""
        pairs = zip(self.sums, self.counts, strict=True)
        return tuple(total / count if count else math.nan for total, count in pairs)

    def extend(self, more: _Extremes) -> None:
        self.lows.extend(more.lows)
        self.highs.extend(more.highs)
        self.broken.extend(more.broken)
        self.sums.extend(more.sums)
        self.counts.extend(more.counts)

    def part(self, start: int) -> _Extremes:
        columns = (self.lows, self.highs, self.sums, self.counts)
        lows, highs, sums, counts = (column[start:] for column in columns)
        return _Extremes(lows, highs, self.broken[start:], sums, counts)

    def pairs(self, start: int, end: int) -> _Extremes:
        """Merge pairs of adjacent buckets from index ``start`` up to ``end``, and return the results."""
        one, other = slice(start, end, 2), slice(start + 1, end, 2)
        return _Extremes(
            array("d", map(min, self.lows[one], self.lows[other])),
            array("d", map(max, self.highs[one], self.highs[other])),
            bytearray(map(or_, self.broken[one], self.broken[other])),
            array("d", map(add, self.sums[one], self.sums[other])),
            array("d", map(add, self.counts[one], self.counts[other])),
        )

    def drop(self, count: int) -> None:
        del self.lows[:count], self.highs[:count], self.broken[:count]
        del self.sums[:count], self.counts[:count]


class _Level:
    """The most recent buckets of a given size, for every column."""

    def __init__(self, columns: int) -> None:
        self.xs = array("d")
        self.columns = [_Extremes() for _ in range(columns)]
        self.dropped = 0

    @property
    def count(self) -> int:
        """Number of buckets that were ever appended."""
        return self.dropped + len(self.xs)

    def extend(self, xs: Sequence[float], columns: Sequence[_Extremes]) -> None:
        if any(len(more.lows) != len(xs) for more in columns):
            raise ValueError("a column is not as long as xs")
        self.xs.extend(array("d", xs))
        for column, more in zip(self.columns, columns, strict=True):
            column.extend(more)

    def pair_into(self, longer: _Level) -> None:
        """Merge each new pair of buckets, and append the result to ``longer``, the level whose buckets are
        twice as large.
        """
        start = 2 * longer.count - self.dropped
        end = start + (len(self.xs) - start) // 2 * 2
        longer.extend(self.xs[start + 1 : end : 2], [column.pairs(start, end) for column in self.columns])

    def shorten(self, most: int) -> None:
        """If there are more than ``2 * most`` buckets, drop the oldest, so that ``most + 1`` buckets remain.
        Because of this margin, buckets are rarely dropped.
        """
        if len(self.xs) <= 2 * most:
            return
        over = len(self.xs) - (most + 1)
        del self.xs[:over]
        for column in self.columns:
            column.drop(over)
        self.dropped += over


@dataclass
class _Moments:
    """Weighted sums of 1, d, d², y and d·y over points (x, y). The distance d of a point is measured along x,
    from the current place, which :meth:`move` changes.
    """

    beta: float
    """Factor by which the weight of a point is multiplied for each unit of distance."""
    ones: float = 0.0
    d: float = 0.0
    dd: float = 0.0
    y: float = 0.0
    dy: float = 0.0

    def move(self, step: float) -> None:
        """Move the origin of the distances along x by ``step``, and multiply the weight of each point by
        ``beta ** abs(step)``.
        """
        fall = self.beta ** abs(step)
        self.dd = fall * (self.dd - 2 * step * self.d + step * step * self.ones)
        self.dy = fall * (self.dy - step * self.y)
        self.d = fall * (self.d - step * self.ones)
        self.ones *= fall
        self.y *= fall

    def add(self, value: float, weight: float) -> None:
        """Add a point at the current place, where d = 0. Skip a value that is not finite."""
        if math.isfinite(value):
            self.ones += weight
            self.y += weight * value


def local_fits(
    xs: Sequence[float],
    values: Sequence[float],
    window: float,
    weights: Sequence[float] | None = None,
    at: Sequence[float] | None = None,
) -> array[float]:
    """For each point, fit a straight line to all points by weighted least squares, and return the heights of
    these lines (local linear regression: Cleveland 1979, with exponential weights).

    In each fit, a point at distance d has the weight β^|d|, where β = 1 - 1 / window. A linear trend is
    reproduced exactly, even at both ends, where a mean would lag behind it. Values that are not finite are
    skipped: the result is NaN before the first finite value, and constant after the last one.

    Args:
        xs: The x of each value, in ascending order.
        values: The values.
        window: Width of the exponential weighting, in units of x; at least 1.
        weights: Additional weight of each value; 1 if None.
        at: The x at which the line of each point is evaluated; ``xs`` if None.
    """
    heights = array("d", [math.nan]) * len(values)
    finite = [place for place, value in enumerate(values) if math.isfinite(value)]
    if not finite:
        return heights
    weights, at, beta = weights or [1.0] * len(values), at or xs, 1 - 1 / window
    after, moments = _Moments(beta), []
    for place in range(finite[-1], finite[0] - 1, -1):
        moments.append(replace(after))
        after.add(values[place], weights[place])
        after.move((xs[place - 1] if place else xs[place]) - xs[place])
    before = _Moments(beta)
    for place in range(finite[0], finite[-1] + 1):
        before.add(values[place], weights[place])
        heights[place] = _line_at(before, moments.pop(), at[place] - xs[place])
        if place < finite[-1]:
            before.move(xs[place + 1] - xs[place])
    heights[finite[-1] + 1 :] = array("d", [heights[finite[-1]]]) * (len(values) - 1 - finite[-1])
    return heights


def _line_at(before: _Moments, after: _Moments, distance: float) -> float:
    """Fit a line to the points in ``before`` and ``after``, and return the line's height. ``distance``: where
    to evaluate the line, measured along x from the place that both share.
    """
    ones, d, dd = before.ones + after.ones, before.d + after.d, before.dd + after.dd
    y, dy = before.y + after.y, before.dy + after.dy
    spread = dd - d * d / ones
    if spread <= 1e-9 * max(dd, 1e-9):
        return y / ones
    slope = (dy - d * y / ones) / spread
    return (y - slope * d) / ones + slope * distance


def smooth(values: Sequence[float], window: float) -> array[float]:
    """Smooth the values by fitting a line to the values around each of them. This is :func:`local_fits` for
    values at x = 1, 2, 3….
    """
    return local_fits(range(1, len(values) + 1), values, window)


_MIN_WINDOW, _MAX_WINDOW = 4, 100


def smoothing_window(total_steps: int) -> float:
    """Return the ``window`` for smoothing a loss, in steps: a thirtieth of the run, but at least
    ``_MIN_WINDOW`` and at most ``_MAX_WINDOW``.
    """
    return float(min(max(total_steps / 30, _MIN_WINDOW), _MAX_WINDOW))
