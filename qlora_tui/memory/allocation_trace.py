"""What one part of a step makes and lets go of, in order, so that it can be replayed on an allocator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from qlora_tui.memory.allocator import SMALL, CachingAllocator, MemoryBlock

Event = tuple[int, int]
"""Number of a storage, and its bytes: positive where it is made, negative where it goes."""
Blocks = dict[int, MemoryBlock]
"""What each storage's number stands for in one run of a part."""


@dataclass(frozen=True)
class AllocationPhase:
    """The forward or the backward of a part."""

    events: tuple[Event, ...] = ()

    @cached_property
    def _large(self) -> tuple[Event, ...]:
        return tuple(event for event in self.events if abs(event[1]) > SMALL)

    @cached_property
    def _lasting(self) -> tuple[Event, ...]:
        """Without what is both made and let go of in it: that finds the same places each time."""
        gone = {number for number, size in self._large if size < 0}
        large_allocations = {number for number, size in self._large if size > 0}
        passing = gone & large_allocations
        return tuple(event for event in self._large if event[0] not in passing)

    @cached_property
    def _small(self) -> tuple[int, int]:
        """Most bytes in small storages, and what is left of them."""
        now = most = 0
        for _, size in self.events:
            if abs(size) <= SMALL:
                now += size
                most = max(most, now)
        return most, now

    def replay(self, allocator: CachingAllocator, blocks: Blocks, *, whole: bool) -> None:
        """Take and give what the stage does; ``whole`` with what only passes."""
        allocator.count(*self._small)
        for number, size in self._large if whole else self._lasting:
            if size > 0:
                blocks[number] = allocator.malloc(size)
            elif number in blocks:
                allocator.free(blocks.pop(number))


@dataclass
class Recording:
    """One part: a layer, or the head with the loss. Numbers are those of storages."""

    forward: AllocationPhase = field(default_factory=AllocationPhase)
    backward: AllocationPhase = field(default_factory=AllocationPhase)
    enters: int = 0
    """The input."""
    leaves: int = 0
    """The output, which is the next part's input."""
    seed: int = 0
    """The gradient that comes in."""
    gradient: int = 0
    """The gradient that goes on to the part before."""

    @cached_property
    def owns_output(self) -> bool:
        """A node of its own saved the output, and lets go of it last."""
        return any(number == self.leaves and size < 0 for number, size in self.backward.events)


def build_phase(events: Iterable[Event], *without: int) -> AllocationPhase:
    """Of these events, but for the last farewell of some storages."""
    events_left = list(events)
    for number in without:
        for place in range(len(events_left) - 1, -1, -1):
            if events_left[place][0] == number and events_left[place][1] < 0:
                del events_left[place]
                break
    return AllocationPhase(tuple(events_left))


def without_input_gradient(events: list[Event]) -> int:
    """After a backward that is the gradient of the part's input, which here nobody takes."""
    return next((number for number, size in reversed(events) if size < 0), 0)
