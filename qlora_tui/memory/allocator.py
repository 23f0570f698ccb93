"""The CUDA caching allocator, replayed: which tensors get which blocks, and what it holds in all for them.

A freed block stays with the allocator, to be given to a later tensor that it is large enough for. Without
expandable segments every large tensor that finds none gets a segment of its own, and is cut from it exactly
only where more than 1 MiB would be left; so up to that much counts as allocated though nobody asked for it,
and a segment whose tensor is gone serves only smaller ones. With expandable segments, which our trainer
switches on, there is one segment that grows at its end, and blocks are cut to size.

Rules and names are those of c10/cuda/CUDACachingAllocator.cpp: ``round_size``, ``get_free_block`` (the
smallest that is large enough, at the lowest address), ``get_allocation_size``, ``should_split``,
``try_merge_blocks``, ``try_allocate_expandable_block``. Tensors of up to 1 MiB come from a pool of their own,
of which only the bytes are counted: its segments are of 2 MiB.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from qlora_tui.memory.autograd import ALLOCATION_BYTES

MIB = 1024 * 1024
SMALL = MIB
"""Up to this size a tensor comes from the pool of small blocks (``kSmallSize``)."""
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
"""A segment for a tensor of less than 10 MiB, and the step in which one that grows does (``kLargeBuffer``).
"""
OWN_SEGMENT = 10 * MIB
"""From this size on a tensor gets a segment of its own, a multiple of 2 MiB (``kMinLargeAlloc``)."""
HIGHEST = 1 << 62
"""Linux hands out addresses from the top down, so a new segment lies below those before it. It matters where
two free blocks are of one size."""


class MemoryBlock:
    """A part of a segment: one tensor's, or free."""

    __slots__ = ("address", "after", "before", "free", "size")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.free = False
        self.before: MemoryBlock | None = None
        self.after: MemoryBlock | None = None

    def __lt__(self, other: MemoryBlock) -> bool:
        return self.address < other.address


class CachingAllocator:
    """Blocks in use and free, in segments that are kept."""

    __slots__ = (
        "_address",
        "_before_emptied_bytes",
        "_capacity_bytes",
        "_expandable",
        "_free",
        "_large_bytes",
        "_last",
        "_most_small_bytes",
        "_taken_bytes",
        "most_allocated_bytes",
        "small_bytes",
    )

    def __init__(self, *, expandable: bool, capacity_bytes: int | None = None) -> None:
        """``capacity_bytes`` is what the card has for it; None for a card without end."""
        self._expandable = expandable
        self._capacity_bytes = capacity_bytes
        self._free: list[tuple[int, MemoryBlock]] = []
        """By size, then address."""
        self._last: MemoryBlock | None = None
        """At the end of the segment that grows."""
        self._address = HIGHEST
        self._taken_bytes = 0
        self._before_emptied_bytes = 0
        self._large_bytes = 0
        self._most_small_bytes = 0
        self.small_bytes = 0
        """In small tensors now."""
        self.most_allocated_bytes = 0

    @property
    def reserved_bytes(self) -> int:
        """Of all segments that it has not given back."""
        return self._taken_bytes + -(-self._most_small_bytes // SMALL_SEGMENT) * SMALL_SEGMENT

    @property
    def most_reserved_bytes(self) -> int:
        """The most it held, counting what a full card made it give back."""
        return max(self.reserved_bytes, self._before_emptied_bytes)

    def count(self, most: int, left: int = 0) -> None:
        """Small tensors came and went, of so many bytes together at most, and so many are left."""
        self._most_small_bytes = max(self._most_small_bytes, self.small_bytes + most)
        self.small_bytes += left
        self._note()

    def keep(self, sizes: Iterable[int]) -> None:
        """Make tensors that stay."""
        small = 0
        for size in sizes:
            if size <= SMALL:
                small += -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES
            else:
                self.malloc(size)
        self.count(small, small)

    def malloc(self, size: int) -> MemoryBlock:
        """Make a tensor."""
        size = -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES
        if size <= SMALL:
            self.count(size, size)
            return MemoryBlock(0, size)
        block = self._find(size) or self._new(size)
        left = block.size - size
        if left and (self._expandable or left > SMALL):
            self._split(block, size)
        block.free = False
        self._large_bytes += block.size
        self._note()
        return block

    def free(self, block: MemoryBlock) -> None:
        """Let a tensor go: its block joins free ones beside it."""
        if block.size <= SMALL:
            self.small_bytes -= block.size
            return
        self._large_bytes -= block.size
        if block.before is not None and block.before.free:
            earlier = block.before
            self._withdraw(earlier)
            self._merge(earlier, block)
            block = earlier
        if block.after is not None and block.after.free:
            self._withdraw(block.after)
            self._merge(block, block.after)
        block.free = True
        insort(self._free, (block.size, block))

    def empty_cache(self) -> None:
        """``torch.cuda.empty_cache``: give back the segments that are wholly free.

        Of one that grows, whole steps that are free would go too; nothing that lets it grow calls this.
        """
        for size, block in [] if self._expandable else list(self._free):
            if block.before is None and block.after is None:
                self._withdraw(block)
                self._taken_bytes -= size

    def _note(self) -> None:
        allocated = self._large_bytes + self.small_bytes
        self.most_allocated_bytes = max(self.most_allocated_bytes, allocated)

    def _find(self, size: int) -> MemoryBlock | None:
        place = bisect_left(self._free, size, key=_size)
        if place == len(self._free):
            return None
        if self._expandable and self._free[place][1] is self._last and place + 1 < len(self._free):
            place += 1  # the end counts as what it could grow to
        return self._free.pop(place)[1]

    def _new(self, size: int) -> MemoryBlock:
        if not self._expandable:
            whole = LARGE_SEGMENT if size < OWN_SEGMENT else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
            if self._capacity_bytes is not None and self.reserved_bytes + whole > self._capacity_bytes:
                self._before_emptied_bytes = max(self._before_emptied_bytes, self.reserved_bytes)
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

    def _split(self, block: MemoryBlock, size: int) -> None:
        rest = MemoryBlock(block.address + size, block.size - size)
        rest.free, rest.before, rest.after = True, block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        if self._last is block:
            self._last = rest
        insort(self._free, (rest.size, rest))

    def _merge(self, block: MemoryBlock, later: MemoryBlock) -> None:
        block.size += later.size
        block.after = later.after
        if later.after is not None:
            later.after.before = block
        if self._last is later:
            self._last = block

    def _withdraw(self, block: MemoryBlock) -> None:
        self._free.pop(bisect_left(self._free, (block.size, block)))


def _size(free: tuple[int, MemoryBlock]) -> int:
    return free[0]
