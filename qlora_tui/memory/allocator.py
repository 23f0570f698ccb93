"""How many bytes the CUDA caching allocator counts for tensors that are made one after another and stay.

Without expandable segments a block is cut from a larger one, and what is left over stays with it when it is
not worth a block of its own: up to 1 MiB a tensor counts as allocated though nobody asked for it. With
expandable segments, which our trainer switches on, blocks are cut exactly.

Rules and names: ``round_size``, ``get_allocation_size`` and ``should_split`` in
c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from qlora_tui.memory.tape import ALLOCATION_BYTES

MIB = 1024 * 1024
SMALL = MIB
"""Up to this size a tensor comes from the pool of small blocks (``kSmallSize``)."""
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB
"""From this size on a tensor gets a segment of its own, a multiple of 2 MiB (``kMinLargeAlloc``)."""


def allocated_bytes(sizes: Iterable[int]) -> int:
    """The sum of the blocks that tensors of these sizes get."""
    pools: dict[bool, list[int]] = {True: [], False: []}
    total = 0
    for size in sizes:
        if not size:
            continue
        wanted = -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES
        small = wanted <= SMALL
        free = pools[small]
        place = bisect_left(free, wanted)
        block = free.pop(place) if place < len(free) else _segment(wanted)
        left = block - wanted
        if left >= ALLOCATION_BYTES if small else left > SMALL:
            insort(free, left)
            block = wanted
        total += block
    return total


def _segment(wanted: int) -> int:
    if wanted <= SMALL:
        return SMALL_SEGMENT
    if wanted < OWN_SEGMENT:
        return LARGE_SEGMENT
    return -(-wanted // SMALL_SEGMENT) * SMALL_SEGMENT
