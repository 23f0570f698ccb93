"""The model of CUDA's allocator, against c10/cuda/CUDACachingAllocator.cpp."""

from __future__ import annotations

import pytest

from qlora_tui.formatting import MIB
from qlora_tui.memory.allocator import CachingAllocator


def _plain() -> CachingAllocator:
    return CachingAllocator(expandable=False)


@pytest.mark.parametrize(
    ("wanted", "reserved"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (9 * MIB, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
    ],
)
def test_a_segment_is_2_or_20_mib_or_exact(wanted: int, reserved: int) -> None:
    allocator = _plain()
    allocator.malloc(wanted)
    assert allocator.reserved_bytes == reserved


def test_up_to_one_mib_is_not_cut_off_a_block() -> None:
    allocator = _plain()
    assert allocator.malloc(11 * MIB).size == 12 * MIB
    assert allocator.most_allocated_bytes == 12 * MIB
    assert allocator.malloc(13 * MIB - 512).size == 13 * MIB - 512  # of 14: more than 1 MiB is left
    assert CachingAllocator(expandable=True).malloc(11 * MIB).size == 11 * MIB


def test_the_smallest_free_block_that_is_large_enough_is_taken() -> None:
    allocator = _plain()
    large, small = allocator.malloc(64 * MIB), allocator.malloc(32 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert allocator.malloc(30 * MIB).address == small.address
    assert allocator.malloc(40 * MIB).address == large.address
    assert allocator.reserved_bytes == 96 * MIB


def test_a_freed_segment_serves_only_smaller_tensors() -> None:
    allocator = _plain()
    allocator.free(allocator.malloc(32 * MIB))
    allocator.malloc(34 * MIB)
    assert allocator.reserved_bytes == 66 * MIB


def test_small_tensors_have_a_pool_in_which_blocks_are_cut_to_size() -> None:
    allocator = _plain()
    allocator.free(allocator.malloc(32 * MIB))
    first, second = allocator.malloc(600 * 1024), allocator.malloc(MIB)
    assert (first.size, second.size, allocator.reserved_bytes) == (600 * 1024, MIB, 34 * MIB)
    third = allocator.malloc(500 * 1024)  # 424 KiB are left
    assert allocator.reserved_bytes == 36 * MIB
    for block in (first, second, third):
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0 and allocator.most_reserved_bytes == 36 * MIB
    growing = CachingAllocator(expandable=True)
    for _ in range(3):
        growing.malloc(MIB)
    assert growing.reserved_bytes == 4 * MIB


def test_freed_neighbors_become_one_block() -> None:
    allocator = _plain()
    allocator.free(allocator.malloc(60 * MIB))
    parts = [allocator.malloc(20 * MIB) for _ in range(3)]
    for place in (0, 2, 1):
        allocator.free(parts[place])
    allocator.malloc(60 * MIB)
    assert allocator.reserved_bytes == 60 * MIB


def test_of_equal_blocks_the_newer_segments_is_lower() -> None:
    allocator = _plain()
    first, second = allocator.malloc(32 * MIB), allocator.malloc(32 * MIB)
    for block in (first, second):
        allocator.free(block)
    assert allocator.malloc(32 * MIB) is second


def test_one_segment_grows_at_its_end_by_20_mib() -> None:
    allocator = CachingAllocator(expandable=True)
    allocator.malloc(50 * MIB)
    assert allocator.reserved_bytes == 60 * MIB
    allocator.malloc(15 * MIB)  # 10 are there
    assert allocator.reserved_bytes == 80 * MIB


def test_a_hole_is_taken_before_the_end_of_the_segment() -> None:
    allocator = CachingAllocator(expandable=True)
    hole = allocator.malloc(18 * MIB)
    allocator.malloc(30 * MIB)  # leaves 12 at the end
    allocator.free(hole)
    assert allocator.malloc(10 * MIB).address == hole.address


def test_an_emptied_cache_gives_back_whole_segments_only() -> None:
    allocator = _plain()
    whole, cut = allocator.malloc(32 * MIB), allocator.malloc(5 * MIB)
    allocator.free(whole)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free(cut)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_a_full_gpu_first_gives_back_what_is_free() -> None:
    allocator = CachingAllocator(expandable=False, capacity_bytes=100 * MIB)
    allocator.free(allocator.malloc(40 * MIB))
    cut = allocator.malloc(30 * MIB)
    assert cut.size == 30 * MIB and allocator.reserved_bytes == 40 * MIB
    allocator.free(allocator.malloc(50 * MIB))
    allocator.malloc(60 * MIB)  # 90 are held, of which the 50 can go
    assert allocator.reserved_bytes == 100 * MIB
    allocator.malloc(20 * MIB)  # nothing is left to give back
    assert allocator.reserved_bytes == allocator.most_reserved_bytes == 120 * MIB


def test_what_a_full_gpu_gave_back_counts_as_reserved() -> None:
    allocator = CachingAllocator(expandable=False, capacity_bytes=100 * MIB)
    allocator.free(allocator.malloc(90 * MIB))
    allocator.malloc(95 * MIB)
    assert (allocator.reserved_bytes, allocator.most_reserved_bytes) == (96 * MIB, 96 * MIB)
    allocator = CachingAllocator(expandable=False, capacity_bytes=100 * MIB)
    first, second = allocator.malloc(48 * MIB), allocator.malloc(48 * MIB)
    allocator.free(first)
    allocator.free(second)
    allocator.malloc(50 * MIB)
    assert (allocator.reserved_bytes, allocator.most_reserved_bytes) == (50 * MIB, 96 * MIB)
