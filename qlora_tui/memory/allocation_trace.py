"""Allocations and frees of one part of a step, in order, so that they can be replayed on an allocator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from qlora_tui.memory.allocator import SMALL, CachingAllocator, MemoryBlock

Event = tuple[int, int]
"""Number of a storage and its bytes: positive for an allocation, negative for a free."""
Blocks = dict[int, MemoryBlock]
"""Block of each storage number in one run of a part."""


@dataclass(frozen=True)
class AllocationPhase:
    """Events of the forward or the backward of a part."""

    events: tuple[Event, ...] = ()

    @cached_property
    def _large(self) -> tuple[Event, ...]:
        """Return the events of large storages, without one that is freed at once for another of its size.

        That one gets the same block, so the first changes nothing.
        """
        large: list[Event] = []
        for event in self.events:
            if abs(event[1]) > SMALL:
                size = event[1]
                if len(large) > 1 and large[-2][1] == size > 0 and large[-1] == (large[-2][0], -size):
                    del large[-2:]
                large.append(event)
        return tuple(large)

    @cached_property
    def _lasting(self) -> tuple[Event, ...]:
        """Return the events without storages that are allocated and freed within the phase."""
        gone = {number for number, size in self._large if size < 0}
        large_allocations = {number for number, size in self._large if size > 0}
        passing = gone & large_allocations
        return tuple(event for event in self._large if event[0] not in passing)

    @cached_property
    def _small(self) -> tuple[int, int]:
        """Return the peak of the bytes in small storages, and the bytes that remain."""
        now = most = 0
        for _, size in self.events:
            if abs(size) <= SMALL:
                now += size
                most = max(most, now)
        return most, now

    def replay(self, allocator: CachingAllocator, blocks: Blocks, *, whole: bool) -> None:
        """Replay the phase on the allocator; with ``whole`` including short-lived storages."""
        allocator.count(*self._small)
        for number, size in self._large if whole else self._lasting:
            if size > 0:
                blocks[number] = allocator.malloc(size)
            elif number in blocks:
                allocator.free(blocks.pop(number))


@dataclass
class Recording:
    """Events of one part: a layer, or the head with the loss. Numbers identify storages."""

    forward: AllocationPhase = field(default_factory=AllocationPhase)
    backward: AllocationPhase = field(default_factory=AllocationPhase)
    enters: int = 0
    """Number of the input."""
    leaves: int = 0
    """Number of the output, which is the next part's input."""
    seed: int = 0
    """Number of the incoming gradient."""
    gradient: int = 0
    """Number of the gradient passed to the previous part."""

    @cached_property
    def owns_output(self) -> bool:
        """Return whether a node in the part saved the output, and frees it last."""
        return any(number == self.leaves and size < 0 for number, size in self.backward.events)


def build_phase(events: Iterable[Event], *without: int) -> AllocationPhase:
    """Build a phase from events, except for the last free of the storages in ``without``."""
    events_left = list(events)
    for number in without:
        for place in range(len(events_left) - 1, -1, -1):
            if events_left[place][0] == number and events_left[place][1] < 0:
                del events_left[place]
                break
    return AllocationPhase(tuple(events_left))


def without_input_gradient(events: list[Event]) -> int:
    """Return the number of the input's gradient after a backward, which no other part uses here."""
    return next((number for number, size in reversed(events) if size < 0), 0)
