"""Replay of the CUDA caching allocator: which tensor gets which block, and how much memory is reserved.

A freed block stays with the allocator, for a later tensor that fits. Without expandable segments every large
tensor that finds none gets a new segment, and is split off only if more than 1 MiB would remain; so up to
that much unused memory counts as allocated, and a segment whose tensor was freed serves only smaller ones.
With expandable segments, which our trainer turns on, there is one segment that grows at its end, and blocks
are cut to size.

Rules and names are those of c10/cuda/CUDACachingAllocator.cpp: ``round_size``, ``get_free_block`` (the
smallest that is large enough, at the lowest address), ``get_allocation_size``, ``should_split``,
``try_merge_blocks``, ``try_allocate_expandable_block``. Tensors of up to 1 MiB come from a separate pool, of
which only the bytes are counted: its segments have 2 MiB.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

from qlora_tui.formatting import MIB
from qlora_tui.memory.weights import ALLOCATION_BYTES

SMALL = MIB
"""Largest tensor that comes from the pool of small blocks (``kSmallSize``)."""
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
"""Segment size for a tensor of less than 10 MiB, and step of a growing segment (``kLargeBuffer``)."""
OWN_SEGMENT = 10 * MIB
"""Size from which a tensor gets its own segment, a multiple of 2 MiB (``kMinLargeAlloc``)."""
HIGHEST = 1 << 62
"""Start of the address range. Linux hands out addresses from the top down, so a new segment lies below the
earlier ones; this matters where two free blocks have the same size."""


class MemoryBlock:
    """A part of a segment: used by one tensor, or free."""

    __slots__ = ("address", "after", "before", "free", "size")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.free = False
        self.before: MemoryBlock | None = None
        self.after: MemoryBlock | None = None


class CachingAllocator:
    """Used and free blocks, in segments that are kept."""

    __slots__ = (
        "_address",
        "_capacity_bytes",
        "_expandable",
        "_free",
        "_large_bytes",
        "_last",
        "_most_small_bytes",
        "_peak_before_release_bytes",
        "_taken_bytes",
        "most_allocated_bytes",
        "small_bytes",
    )

    def __init__(self, *, expandable: bool, capacity_bytes: int | None = None) -> None:
        """``capacity_bytes`` is the GPU memory available to it; None is unlimited."""
        self._expandable = expandable
        self._capacity_bytes = capacity_bytes
        self._free: list[tuple[int, int, MemoryBlock]] = []
        """Free blocks by size, then address, which no two of them share."""
        self._last: MemoryBlock | None = None
        """Block at the end of the growing segment."""
        self._address = HIGHEST
        self._taken_bytes = 0
        self._peak_before_release_bytes = 0
        self._large_bytes = 0
        self._most_small_bytes = 0
        self.small_bytes = 0
        """Bytes in small tensors now."""
        self.most_allocated_bytes = 0

    @property
    def reserved_bytes(self) -> int:
        """Return the bytes of all segments that have not been released."""
        return self._taken_bytes + -(-self._most_small_bytes // SMALL_SEGMENT) * SMALL_SEGMENT

    @property
    def most_reserved_bytes(self) -> int:
        """Return the peak of reserved bytes, including segments that a full GPU made it release."""
        return max(self.reserved_bytes, self._peak_before_release_bytes)

    def count(self, most: int, left: int = 0) -> None:
        """Count small tensors: at most ``most`` bytes at once, of which ``left`` bytes remain."""
        if self.small_bytes + most > self._most_small_bytes:
            self._most_small_bytes = self.small_bytes + most
        self.small_bytes += left
        self.most_allocated_bytes = max(self.most_allocated_bytes, self._large_bytes + self.small_bytes)

    def keep(self, sizes: Iterable[int]) -> None:
        """Allocate permanent tensors."""
        small = 0
        for size in sizes:
            if size <= SMALL:
                small += -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES
            else:
                self.malloc(size)
        self.count(small, small)

    def malloc(self, size: int) -> MemoryBlock:
        """Allocate a tensor in the smallest free block that is large enough, or in new memory.

        One call, like ``free``: an estimate makes ten thousand of each.
        """
        size = -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES
        if size <= SMALL:
            self.count(size, size)
            return MemoryBlock(0, size)
        free = self._free
        place = bisect_left(free, (size,))
        if place == len(free):
            block = self._new(size)
        else:
            if self._expandable and free[place][2] is self._last and place + 1 < len(free):
                place += 1  # the end counts with what it could grow to
            block = free.pop(place)[2]
        left = block.size - size
        if left and (self._expandable or left > SMALL):
            rest, later = MemoryBlock(block.address + size, left), block.after
            rest.free, rest.before, rest.after = True, block, later
            if later is not None:
                later.before = rest
            block.after, block.size = rest, size
            if self._last is block:
                self._last = rest
            insort(free, (left, rest.address, rest))
        block.free = False
        self._large_bytes += block.size
        if self._large_bytes + self.small_bytes > self.most_allocated_bytes:
            self.most_allocated_bytes = self._large_bytes + self.small_bytes
        return block

    def free(self, block: MemoryBlock) -> None:
        """Free a tensor: its block is merged with adjacent free ones."""
        if block.size <= SMALL:
            self.small_bytes -= block.size
            return
        self._large_bytes -= block.size
        free, earlier, later = self._free, block.before, block.after
        if later is not None and later.free:
            del free[bisect_left(free, (later.size, later.address))]
            block.size += later.size
            block.after = later.after
            if later.after is not None:
                later.after.before = block
            if self._last is later:
                self._last = block
        if earlier is not None and earlier.free:
            del free[bisect_left(free, (earlier.size, earlier.address))]
            earlier.size += block.size
            earlier.after = block.after
            if block.after is not None:
                block.after.before = earlier
            if self._last is block:
                self._last = earlier
            block = earlier
        block.free = True
        insort(free, (block.size, block.address, block))

    def empty_cache(self) -> None:
        """Release the segments that are entirely free, like ``torch.cuda.empty_cache``.

        Free steps of a growing segment would be released too, but no caller uses both.
        """
        for size, _, block in [] if self._expandable else list(self._free):
            if block.before is None and block.after is None:
                self._withdraw(block)
                self._taken_bytes -= size

    def _new(self, size: int) -> MemoryBlock:
        if not self._expandable:
            whole = LARGE_SEGMENT if size < OWN_SEGMENT else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
            if self._capacity_bytes is not None and self.reserved_bytes + whole > self._capacity_bytes:
                self._peak_before_release_bytes = max(self._peak_before_release_bytes, self.reserved_bytes)
                self.empty_cache()  # release_cached_blocks, before cudaMalloc is tried again
            self._taken_bytes += whole
            self._address -= whole
            return MemoryBlock(self._address, whole)
        last = self._last
        if last is not None and last.free:
            self._withdraw(last)
            more = -(-(size - last.size) // LARGE_SEGMENT) * LARGE_SEGMENT
            last.size += more
        else:
            more = -(-size // LARGE_SEGMENT) * LARGE_SEGMENT
            block = MemoryBlock(0 if last is None else last.address + last.size, more)
            block.before = last
            if last is not None:
                last.after = block
            last = self._last = block
        self._taken_bytes += more
        return last

    def _withdraw(self, block: MemoryBlock) -> None:
        self._free.pop(bisect_left(self._free, (block.size, block.address)))


@dataclass(frozen=True)
class Pool:
    """Totals of the allocator, in bytes."""

    allocated_bytes: int
    """``max_memory_allocated``: tensors, and the unused rest of their blocks."""
    reserved_bytes: int
    """``max_memory_reserved`` of the steps."""


Event = tuple[int, int]
"""Number of a storage and its bytes: positive for an allocation, negative for a free."""
