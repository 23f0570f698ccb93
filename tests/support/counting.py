"""Cost as a number of calls: the same on every machine, however busy."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

from qlora_tui.memory.autograd import AllocationMeter


def count_allocations(work: Callable[[], object]) -> int:
    """Return how many allocations and frees the memory estimate replays in ``work``.

    Not all function calls: in Python 3.11 a process with a profiler sometimes stayed in one call for good.
    """
    count = 0
    add = AllocationMeter.add

    def counted(self: AllocationMeter, number: int, size: int, item: str) -> None:
        nonlocal count
        count += 1
        add(self, number, size, item)

    with patch.object(AllocationMeter, "add", counted):
        work()
    return count
