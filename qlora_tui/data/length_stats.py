"""Lengths of samples: percentiles and a histogram, from counts that stay small for any number of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from msgspec import Struct

_BINS = 24


class Bin(Struct, frozen=True):
    """Samples longer than the bin before and at most ``up_to``."""

    up_to: int
    count: int


class Lengths(Struct, frozen=True):
    """Length distribution of the samples, before truncation."""

    unit: str
    """``tokens``, or ``characters`` where no tokenizer was given."""
    count: int = 0
    mean: float = 0.0
    p50: int = 0
    p90: int = 0
    p99: int = 0
    longest: int = 0
    longest_row: int = 0
    histogram: tuple[Bin, ...] = ()
    within: tuple[tuple[int, int], ...] = ()
    """Each percentile and the longest, with the exact number of samples that are no longer."""


class LengthCounter:
    """Collects lengths one at a time."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self._counts: Counter[int] = Counter()
        self._longest_row = 0
        self._longest = -1

    def add(self, lengths: Iterable[int], row: int) -> None:
        """Add the samples of one row."""
        for length in lengths:
            self._counts[length] += 1
            if length > self._longest:
                self._longest, self._longest_row = length, row

    def above(self, limit: int) -> int:
        """Count the samples longer than ``limit``."""
        return sum(count for length, count in self._counts.items() if length > limit)

    def summary(self) -> Lengths:
        """Compute percentiles (nearest rank) and the histogram."""
        if not self._counts:
            return Lengths(self.unit)
        ordered = sorted(self._counts.items())
        total = sum(count for _, count in ordered)
        p50, p90, p99 = (_percentile(ordered, total, percent) for percent in (50, 90, 99))
        return Lengths(
            unit=self.unit,
            count=total,
            mean=sum(length * count for length, count in ordered) / total,
            p50=p50,
            p90=p90,
            p99=p99,
            longest=self._longest,
            longest_row=self._longest_row,
            histogram=_histogram(ordered, p99),
            within=tuple((length, total - self.above(length)) for length in (p50, p90, p99, self._longest)),
        )


def _percentile(ordered: list[tuple[int, int]], total: int, percent: int) -> int:
    rank = -(-total * percent // 100)
    seen = 0
    for length, count in ordered:
        seen += count
        if seen >= rank:
            return length
    return ordered[-1][0]


def _histogram(ordered: list[tuple[int, int]], p99: int) -> tuple[Bin, ...]:
    """Compute even bins for nearly all samples, and one last bin for a tail that would flatten the others."""
    longest = ordered[-1][0]
    width = _round_width(min(longest, 1.15 * p99) / (_BINS - 1))
    bins: Counter[int] = Counter()
    for length, count in ordered:
        bins[min(max(0, length - 1) // width, _BINS - 1)] += count
    last = max(bins)
    ends = [(n + 1) * width for n in range(last)]
    ends.append(longest if last == _BINS - 1 else (last + 1) * width)
    return tuple(Bin(end, bins[n]) for n, end in enumerate(ends))


def _round_width(least: float) -> int:
    """Return the smallest readable width not below ``least``: 1 to 6 or 8, times a power of ten."""
    power = 1
    while True:
        for digit in (1, 2, 3, 4, 5, 6, 8):
            if digit * power >= least:
                return digit * power
        power *= 10
