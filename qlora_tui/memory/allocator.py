"""Replays the CUDA caching allocator: which block each tensor gets, and how much memory is reserved.

A freed block stays with the allocator, for a later tensor that fits. Tensors of up to 1 MiB and larger
tensors have separate pools. Without expandable segments, every large tensor for which there is no block gets
a new segment. Its block is split off only if more than 1 MiB would remain, so up to 1 MiB of unused memory
counts as allocated. A segment whose tensor was freed serves only tensors that are not larger. With expandable
segments, which our trainer turns on, a pool is one segment that grows at its end, and blocks are cut to size.

Rules and names are those of c10/cuda/CUDACachingAllocator.cpp: ``round_size``, ``get_free_block`` (the
smallest that is large enough, at the lowest address), ``get_allocation_size``, ``should_split``,
``try_merge_blocks``, ``try_allocate_expandable_block``.
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
"""Segment size for small tensors, and rounding of a large tensor's own segment (``kSmallBuffer``)."""
LARGE_SEGMENT = 20 * MIB
"""Segment size for a large tensor of less than 10 MiB, and step by which the expandable segment of large
tensors grows (``kLargeBuffer``).
"""
OWN_SEGMENT = 10 * MIB
"""Size from which a tensor gets its own segment, whose size is a multiple of 2 MiB (``kMinLargeAlloc``)."""
HIGHEST = 1 << 62
"""Upper end of the address range.

Linux assigns addresses from the top down, so a new segment lies below earlier ones. This matters if two free
blocks have the same size.
"""


class MemoryBlock:
    """A part of a segment: used by one tensor, or free."""

    __slots__ = ("address", "after", "before", "free", "size")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.free = False
        self.before: MemoryBlock | None = None
        self.after: MemoryBlock | None = None


class _Pool:
    """The blocks of small or of large tensors."""

    __slots__ = ("free", "last", "step")

    def __init__(self, step: int) -> None:
        self.step = step
        """Number of bytes by which a growing segment grows."""
        self.free: list[tuple[int, int, MemoryBlock]] = []
        """Free blocks by size, then by address, which is unique."""
        self.last: MemoryBlock | None = None
        """The block at the end of the growing segment."""

    def put(self, block: MemoryBlock) -> None:
        block.free = True
        insort(self.free, (block.size, block.address, block))

    def take(self, block: MemoryBlock) -> None:
        del self.free[bisect_left(self.free, (block.size, block.address))]

    def join(self, block: MemoryBlock, after: MemoryBlock) -> None:
        """Append a block's neighbor to the block."""
        block.size += after.size
        block.after = after.after
        if block.after is not None:
            block.after.before = block
        if self.last is after:
            self.last = block


class CachingAllocator:
    """The used and free blocks of a GPU, in segments that stay reserved until :meth:`empty_cache`."""

    __slots__ = (
        "_address",
        "_allocated_bytes",
        "_capacity_bytes",
        "_expandable",
        "_large",
        "_small",
        "most_allocated_bytes",
        "most_reserved_bytes",
        "reserved_bytes",
    )

    def __init__(self, *, expandable: bool, capacity_bytes: int | None = None) -> None:
        """Start empty; ``capacity_bytes`` is the GPU memory available to the allocator, None for no limit."""
        self._expandable = expandable
        self._capacity_bytes = capacity_bytes
        self._small, self._large = _Pool(SMALL_SEGMENT), _Pool(LARGE_SEGMENT)
        self._address = HIGHEST
        self._allocated_bytes = 0
        self.most_allocated_bytes = 0
        self.reserved_bytes = 0
        """Bytes of all segments that have not been released."""
        self.most_reserved_bytes = 0
        """Peak of ``reserved_bytes``, including segments that were released because the GPU was full."""

    def keep(self, sizes: Iterable[int]) -> None:
        """Allocate permanent tensors."""
        for size in sizes:
            self.malloc(size)

    def malloc(self, size: int) -> MemoryBlock:
        """Allocate a tensor in the smallest free block that is large enough, or in new memory.

        This is a single function, like ``free``, for speed: a step makes ten thousand of these calls.
        """
        size = max(1, -(-size // ALLOCATION_BYTES)) * ALLOCATION_BYTES
        pool = self._small if size <= SMALL else self._large
        free = pool.free
        place = bisect_left(free, (size,))
        if place == len(free):
            block = self._new(pool, size)
        else:
            if self._expandable and free[place][2] is pool.last and place + 1 < len(free):
                place += 1  # the last block counts with the size to which it could grow
            block = free.pop(place)[2]
        left = block.size - size
        if left and (self._expandable or size <= SMALL or left > SMALL):
            rest, block.size = MemoryBlock(block.address + size, left), size
            rest.before, rest.after, block.after = block, block.after, rest
            if rest.after is not None:
                rest.after.before = rest
            if pool.last is block:
                pool.last = rest
            pool.put(rest)
        block.free = False
        self._allocated_bytes += block.size
        if self._allocated_bytes > self.most_allocated_bytes:
            self.most_allocated_bytes = self._allocated_bytes
        return block

    def free(self, block: MemoryBlock) -> None:
        """Free a tensor, and merge its block with adjacent free blocks."""
        pool = self._small if block.size <= SMALL else self._large
        self._allocated_bytes -= block.size
        earlier, later = block.before, block.after
        if later is not None and later.free:
            pool.take(later)
            pool.join(block, later)
        if earlier is not None and earlier.free:
            pool.take(earlier)
            pool.join(earlier, block)
            block = earlier
        pool.put(block)

    def empty_cache(self) -> None:
        """Release the segments that are entirely free, like ``torch.cuda.empty_cache``.

        PyTorch would also release free parts of an expandable segment, but no caller uses both this method
        and expandable segments.
        """
        for pool in () if self._expandable else (self._small, self._large):
            for size, _, block in list(pool.free):
                if block.before is None and block.after is None:
                    pool.take(block)
                    self.reserved_bytes -= size

    def _new(self, pool: _Pool, size: int) -> MemoryBlock:
        if not self._expandable:
            whole = pool.step if size < OWN_SEGMENT else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
            if self._capacity_bytes is not None and self.reserved_bytes + whole > self._capacity_bytes:
                self.empty_cache()  # release_cached_blocks, before cudaMalloc is tried again
            self._reserve(whole)
            self._address -= whole
            return MemoryBlock(self._address, whole)
        last = pool.last
        if last is not None and last.free:
            pool.take(last)
            more = -(-(size - last.size) // pool.step) * pool.step
            last.size += more
        else:
            more = -(-size // pool.step) * pool.step
            block = MemoryBlock(0 if last is None else last.address + last.size, more)
            block.before = last
            if last is not None:
                last.after = block
            last = pool.last = block
        self._reserve(more)
        return last

    def _reserve(self, size: int) -> None:
        self.reserved_bytes += size
        self.most_reserved_bytes = max(self.most_reserved_bytes, self.reserved_bytes)


@dataclass(frozen=True)
class Pool:
    """Peaks of the allocator's totals, in bytes."""

    allocated_bytes: int
    """``max_memory_allocated``: tensors, and the unused rest of their blocks."""
    reserved_bytes: int
    """``max_memory_reserved`` of the steps."""


Event = tuple[int, int]
"""Index of a storage and its bytes, positive for an allocation and negative for a free."""
