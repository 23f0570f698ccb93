"""A run's allocations in their order, on a model of CUDA's allocator: what it reserves for them.

The weights are loaded, the adapter is put in, and two steps are done, since the optimizer's states are made
at the end of the first and lie between the tensors of the second. What is alive at the peak says little of
what must be reserved: a block that one tensor left serves the next only if it is large enough, and logits, or
the scores of an eager attention, often find none that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.memory.allocation_trace import Blocks, Recording
from qlora_tui.memory.allocator import CachingAllocator, MemoryBlock
from qlora_tui.memory.execution import ExecutionConfig
from qlora_tui.memory.layout import Layout
from qlora_tui.memory.loading import load
from qlora_tui.memory.ops import FLOAT
from qlora_tui.memory.static_memory import input_bytes, mask_bytes, workspace_bytes
from qlora_tui.memory.step import PartProfile, StepProfile, embedding_bytes
from qlora_tui.memory.weights import state_sizes
from qlora_tui.recipe.schema import Recipe

STEPS = 2
ENDS, ENDS_THAT_KEEP = 2, 8
"""Layers at either end of a row of equal ones that are replayed in full where blocks are cut to size: what
only passes finds the same places in all layers between. Over eight families, with and without dropout, that
is within 1 % of the whole where a layer leaves but its checkpoint, and 2 % where it keeps what it saves."""

NOTHING = MemoryBlock(0, 0)
"""Stands for a small tensor, which the parts only count."""


@dataclass(frozen=True)
class Pool:
    """What the allocator came to, in bytes."""

    allocated_bytes: int
    """``max_memory_allocated``: tensors, and what was not cut off their blocks."""
    reserved_bytes: int
    """``max_memory_reserved`` of the steps."""


def replay(
    recipe: Recipe,
    architecture: Architecture,
    layout: Layout,
    path: ExecutionConfig,
    walked: StepProfile,
    capacity_bytes: int | None = None,
) -> Pool:
    """Load and train. An allocator that reaches ``capacity_bytes`` gives back what is free before it takes
    more, unless its segments grow."""
    allocator = CachingAllocator(expandable=path.expandable_segments, capacity_bytes=capacity_bytes)
    load(allocator, recipe, architecture, layout, path)
    run = _Run(allocator, architecture, layout, path, walked)
    for step in range(STEPS):
        run.step(first=not step)
    return Pool(allocator.most_allocated_bytes, allocator.most_reserved_bytes)


class _Run:
    """Steps on one allocator."""

    def __init__(
        self,
        allocator: CachingAllocator,
        architecture: Architecture,
        layout: Layout,
        path: ExecutionConfig,
        walked: StepProfile,
    ) -> None:
        self._allocator = allocator
        self._layout = layout
        self._path = path
        self._head = walked.head.recording
        ends = ENDS if path.checkpointing else ENDS_THAT_KEEP
        if not path.expandable_segments:
            ends = len(walked.layers)
        between = _between_equals(walked.layers, ends)
        self._layers = [(layer.recording, not passed) for layer, passed in between]
        self._embedded_bytes = layout.tokens * layout.hidden * embedding_bytes(path)
        self._keeps_embedding = layout.embedding_apart or not walked.layers[0].keeps_input
        self._inputs = (input_bytes(architecture, layout, path), mask_bytes(layout, path))

    def step(self, *, first: bool) -> None:
        """Forward, backward, optimizer. At the end all that it made goes, gradients too."""
        allocator = self._allocator
        small = allocator.small_bytes
        alive = take_all(allocator, self._inputs)
        if self._layout.embedding_apart:
            alive.append(allocator.malloc(self._embedded_bytes))
        x = allocator.malloc(self._embedded_bytes)
        if self._keeps_embedding and not self._layout.embedding_apart:
            alive.append(x)
        if first:
            allocator.malloc(workspace_bytes(self._path))  # this thread's, with its first product
        owned = not self._keeps_embedding or self._layout.embedding_apart
        parts: list[Blocks] = []
        for recording, whole in self._layers:
            x = self._forward(recording, x, parts, owned=owned, whole=whole)
            owned = not recording.owns_output
        self._forward(self._head, x, parts, owned=owned, whole=True)
        if first:
            allocator.malloc(workspace_bytes(self._path))  # that of autograd's thread
        gradient = allocator.malloc(FLOAT)  # of the loss: 1
        for recording, whole in [*self._layers, (self._head, True)][::-1]:
            blocks = parts.pop()
            blocks[recording.seed] = gradient
            recording.backward.replay(allocator, blocks, whole=whole)
            gradient = blocks.pop(recording.gradient, NOTHING)
            alive += blocks.values()
        alive.append(gradient)
        allocated_bytes = self._optimize(first=first) + self._accumulate(first=first)
        for block in alive:
            allocator.free(block)
        # Small ones were counted by the parts, not given back one by one.
        allocator.small_bytes = small + allocated_bytes

    def _forward(
        self, recording: Recording, x: MemoryBlock, parts: list[Blocks], *, owned: bool, whole: bool
    ) -> MemoryBlock:
        """One part's; returns its output. Without ``owned`` its input is another's to let go of."""
        blocks: Blocks = {recording.enters: x} if owned else {}
        recording.forward.replay(self._allocator, blocks, whole=whole)
        parts.append(blocks)
        if recording.owns_output:
            return blocks.get(recording.leaves, NOTHING)
        return blocks.pop(recording.leaves, NOTHING)

    def _accumulate(self, *, first: bool) -> int:
        """Gradients stay from one micro-step to the next. Returns how many bytes are in small tensors."""
        before = self._allocator.small_bytes
        if first and self._path.accumulates:
            self._allocator.keep(count * self._path.adapter_bytes for count in self._layout.adapter_tensors)
        return self._allocator.small_bytes - before

    def _optimize(self, *, first: bool) -> int:
        """Make the states, in the first step; gradients are there all the while.

        Returns how many bytes of them are in small tensors.
        """
        allocator, path, sizes = self._allocator, self._path, self._layout.adapter_tensors
        before = allocator.small_bytes
        if first and not path.optimizer.startswith("paged"):
            allocator.keep(size for count in sizes for size in state_sizes(count, path))
        allocated_bytes = allocator.small_bytes - before
        if path.optimizer == "adamw":
            for block in take_all(allocator, (count * path.adapter_bytes for count in sizes)):
                allocator.free(block)
        return allocated_bytes


def take_all(allocator: CachingAllocator, sizes: Iterable[int]) -> list[MemoryBlock]:
    """Make tensors one after another."""
    return [allocator.malloc(size) for size in sizes if size]


def _between_equals(layers: tuple[PartProfile, ...], ends: int) -> Iterator[tuple[PartProfile, bool]]:
    """Each layer, and whether so many on either side of it are equal to it."""
    for place, layer in enumerate(layers):
        near = layers[max(0, place - ends) : place] + layers[place + 1 : place + 1 + ends]
        yield layer, len(near) == 2 * ends and all(other is layer for other in near)
