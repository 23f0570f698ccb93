"""The replayed allocator against the rules of c10/cuda/CUDACachingAllocator.cpp."""

from __future__ import annotations

import pytest

from qlora_tui.memory.allocator import MIB, CachingAllocator


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
def test_a_segment_is_of_2_or_20_mib_or_the_tensors_own_size(wanted: int, reserved: int) -> None:
    allocator = _plain()
    allocator.take(wanted)
    assert allocator.reserved_bytes == reserved


def test_up_to_one_mib_is_not_cut_off_a_block() -> None:
    allocator = _plain()
    assert allocator.take(11 * MIB).size == 12 * MIB
    assert allocator.most_allocated_bytes == 12 * MIB
    assert allocator.take(13 * MIB - 512).size == 13 * MIB - 512  # of 14: more than 1 MiB is left
    assert CachingAllocator(expandable=True).take(11 * MIB).size == 11 * MIB


def test_the_smallest_free_block_that_is_large_enough_is_taken() -> None:
    allocator = _plain()
    large, small = allocator.take(64 * MIB), allocator.take(32 * MIB)
    allocator.give(large)
    allocator.give(small)
    assert allocator.take(30 * MIB).address == small.address
    assert allocator.take(40 * MIB).address == large.address
    assert allocator.reserved_bytes == 96 * MIB


def test_a_freed_segment_serves_only_smaller_tensors() -> None:
    allocator = _plain()
    allocator.give(allocator.take(32 * MIB))
    allocator.take(34 * MIB)
    assert allocator.reserved_bytes == 66 * MIB


def test_freed_neighbours_become_one_block() -> None:
    allocator = _plain()
    allocator.give(allocator.take(60 * MIB))
    parts = [allocator.take(20 * MIB) for _ in range(3)]
    for place in (0, 2, 1):
        allocator.give(parts[place])
    allocator.take(60 * MIB)
    assert allocator.reserved_bytes == 60 * MIB


def test_of_two_equal_blocks_the_lower_is_the_segment_made_later() -> None:
    allocator = _plain()
    first, second = allocator.take(32 * MIB), allocator.take(32 * MIB)
    for block in (first, second):
        allocator.give(block)
    assert allocator.take(32 * MIB) is second


def test_one_segment_grows_at_its_end_by_20_mib() -> None:
    allocator = CachingAllocator(expandable=True)
    allocator.take(50 * MIB)
    assert allocator.reserved_bytes == 60 * MIB
    allocator.take(15 * MIB)  # 10 are there
    assert allocator.reserved_bytes == 80 * MIB


def test_a_hole_is_taken_before_the_end_of_the_segment() -> None:
    allocator = CachingAllocator(expandable=True)
    hole = allocator.take(18 * MIB)
    allocator.take(30 * MIB)  # leaves 12 at the end
    allocator.give(hole)
    assert allocator.take(10 * MIB).address == hole.address


def test_an_emptied_cache_gives_back_whole_segments_only() -> None:
    allocator = _plain()
    whole, cut = allocator.take(32 * MIB), allocator.take(5 * MIB)
    allocator.give(whole)
    allocator.empty()
    assert allocator.reserved_bytes == 20 * MIB
    allocator.give(cut)
    allocator.empty()
    assert allocator.reserved_bytes == 0


def test_a_full_card_first_gives_back_what_is_free() -> None:
    allocator = CachingAllocator(expandable=False, capacity_bytes=100 * MIB)
    allocator.give(allocator.take(40 * MIB))
    cut = allocator.take(30 * MIB)
    assert cut.size == 30 * MIB and allocator.reserved_bytes == 40 * MIB
    allocator.give(allocator.take(50 * MIB))
    allocator.take(60 * MIB)  # 90 are held, of which the 50 can go
    assert allocator.reserved_bytes == 100 * MIB
    allocator.take(20 * MIB)  # nothing is left to give back
    assert allocator.reserved_bytes == allocator.most_reserved_bytes == 120 * MIB


def test_what_a_full_card_gave_back_counts_as_reserved() -> None:
    allocator = CachingAllocator(expandable=False, capacity_bytes=100 * MIB)
    allocator.give(allocator.take(90 * MIB))
    allocator.take(95 * MIB)
    assert (allocator.reserved_bytes, allocator.most_reserved_bytes) == (96 * MIB, 96 * MIB)
    allocator = CachingAllocator(expandable=False, capacity_bytes=100 * MIB)
    first, second = allocator.take(48 * MIB), allocator.take(48 * MIB)
    allocator.give(first)
    allocator.give(second)
    allocator.take(50 * MIB)
    assert (allocator.reserved_bytes, allocator.most_reserved_bytes) == (50 * MIB, 96 * MIB)
