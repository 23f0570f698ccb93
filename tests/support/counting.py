"""Cost as a number of estimates: the same on every machine, however busy."""

from __future__ import annotations

from collections.abc import Callable

from qlora_tui.memory.estimate import cached_estimate


def count_estimates(work: Callable[[], object]) -> int:
    """Return how many estimates are calculated in ``work``, and not taken from the cache."""
    before = cached_estimate.cache_info().misses
    work()
    return cached_estimate.cache_info().misses - before
