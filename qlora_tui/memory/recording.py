"""Replays the allocations of a run with a traced step, in order, to find the memory that they take on a GPU.

A run loads its model and then makes equal steps, except that the optimizer's states are created at the end of
the first step and lie between the tensors of the second. The reserved bytes do not follow from the bytes
alive at the peak: a freed block serves another tensor only if it is large enough, and often no block is large
enough for logits or the scores of eager attention. The step's tensors use the blocks that :mod:`.loading`
leaves free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod

from msgspec import Struct

from qlora_tui.memory.allocator import CachingAllocator, Event, MemoryBlock, Pool
from qlora_tui.memory.execution import ADAPTER_ITEMSIZE, ExecutionConfig
from qlora_tui.memory.loading import LoadedWeight, load
from qlora_tui.memory.static_memory import FROZEN, state_sizes, step_itemsize, workspace_bytes
from qlora_tui.memory.step import Moment, Phase
from qlora_tui.memory.weights import round_to_block


@dataclass(frozen=True)
class Mark:
    """The beginning of a part of the step."""

    phase: Phase
    name: str
    """Name of the moment, as in :attr:`.step.Moment.name`."""
    at: int
    """Number of events before the part."""


@dataclass(frozen=True)
class MicroStep:
    """Forward, loss and backward of one micro-batch."""

    events: Sequence[Event]
    items: Sequence[str]
    """Item of each storage, by the storage's index."""
    marks: Sequence[Mark]
    backward_at: int
    """Number of events before the backward."""
    gradients: frozenset[int]
    """Storages of the gradients that the micro-step leaves."""
    layers: Mapping[int, int] = field(default_factory=dict)
    """Layer of each copy of adapter weights that is made before the layers run."""

    @property
    def lasting(self) -> frozenset[int]:
        """Return the storages that the micro-step leaves: gradients, and copies of the adapter."""
        alive: set[int] = set()
        for number, size in self.events:
            (alive.add if size > 0 else alive.discard)(number)
        return frozenset(alive)

    @property
    def lasting_items(self) -> Counter[str]:
        """Return the bytes that the micro-step leaves, by item."""
        items: Counter[str] = Counter()
        for number, size in self.events:
            items[self.items[number]] += size
        return +items


def step_moments(micro_steps: Sequence[MicroStep]) -> list[Moment]:
    """Return the moment with the most memory in each part of the last micro-step. Tensors allocated before
    the step are not included.
    """
    step = micro_steps[-1]
    totals = [0, *accumulate(size for _, size in step.events)]
    ends = [mark.at for mark in step.marks[1:]] + [len(step.events)]
    now = Counter(sum((earlier.lasting_items for earlier in micro_steps[:-1]), Counter()))
    done, moments = 0, []
    for mark, end in zip(step.marks, ends, strict=True):
        fullest = max(range(mark.at, end + 1), key=totals.__getitem__)
        for number, size in step.events[done:fullest]:
            now[step.items[number]] += size
        done = fullest
        moments.append(Moment(mark.phase, mark.name, dict(+now)))
    return moments


def run_pool(
    weights: Sequence[LoadedWeight],
    micro_steps: Sequence[MicroStep],
    adapter_shapes: Sequence[tuple[int, ...]],
    input_sizes: Iterable[int],
    execution: ExecutionConfig,
    *,
    adapters: int = 1,
    slot_sizes: Sequence[int] = (),
    room_bytes: int | None = None,
) -> Pool:
    """Load the model on a GPU, run two steps, and return the allocator's totals.

    Args:
        weights: weights on the device, in the model's order.
        micro_steps: the first micro-step of a step and, if the step has several, a later one, which adds to
            the gradients.
        adapter_shapes: shape of each trained tensor.
        input_sizes: bytes of each tensor of the micro-batch.
        execution: the code that runs.
        adapters: number of copies of the adapter, of which one is trained.
        slot_sizes: bytes of the buffers of streamed layers, whose weights are not in ``weights``.
        room_bytes: the most that the allocator can take; before it takes more, it releases free segments,
            unless its segments grow.
    """
    allocator = CachingAllocator(expandable=execution.expandable_segments, capacity_bytes=room_bytes)
    load(allocator, weights, slot_sizes, execution)
    for _ in range(adapters):
        allocator.keep(prod(shape) * ADAPTER_ITEMSIZE for shape in adapter_shapes)
    _run_steps(allocator, micro_steps, adapter_shapes, tuple(input_sizes), execution)
    return Pool(allocator.most_allocated_bytes, allocator.most_reserved_bytes)


def _run_steps(
    allocator: CachingAllocator,
    micro_steps: Sequence[MicroStep],
    shapes: Sequence[tuple[int, ...]],
    inputs: Sequence[int],
    execution: ExecutionConfig,
) -> None:
    copies: list[MemoryBlock] = []
    """Copies of the adapter in the compute dtype, which the first forward makes."""
    for is_first in (True, False):
        gradients: list[MemoryBlock] = []
        for place, micro_step in enumerate(micro_steps):
            alive = [allocator.malloc(size) for size in inputs]
            is_start = is_first and not place
            blocks = _run_micro_step(allocator, micro_step, execution, is_start=is_start)
            for number, block in blocks.items():
                lasting = gradients if number in micro_step.gradients else copies
                lasting.append(block)
            for block in alive:
                allocator.free(block)
        _optimize(allocator, shapes, execution, is_first=is_first)
        for block in gradients:
            allocator.free(block)


def _run_micro_step(
    allocator: CachingAllocator, micro_step: MicroStep, execution: ExecutionConfig, *, is_start: bool
) -> Mapping[int, MemoryBlock]:
    """Replay forward and backward; return the blocks that remain."""
    blocks: dict[int, MemoryBlock] = {}
    skipped = frozenset[int]() if is_start else micro_step.lasting - micro_step.gradients
    for place, (number, size) in enumerate(micro_step.events):
        if is_start and place in (0, micro_step.backward_at):
            # The first product of each thread allocates a workspace: in this thread and in autograd's.
            allocator.malloc(workspace_bytes(execution))
        if number in skipped:
            continue
        if size > 0:
            blocks[number] = allocator.malloc(size)
        else:
            allocator.free(blocks.pop(number))
    return blocks


def _optimize(
    allocator: CachingAllocator,
    shapes: Sequence[tuple[int, ...]],
    execution: ExecutionConfig,
    *,
    is_first: bool,
) -> None:
    """Allocate the temporary tensors of the optimizer's step and, in the first step, its states."""
    if is_first and not execution.pages_states:
        allocator.keep(size for shape in shapes for size in state_sizes(shape, execution))
    counts = [prod(shape) for shape in shapes]
    if execution.optimizer == "adamw":
        for block in [allocator.malloc(count * ADAPTER_ITEMSIZE) for count in counts]:
            allocator.free(block)
    elif itemsize := step_itemsize(execution):
        for count in counts:
            allocator.free(allocator.malloc(count * itemsize))


def optimizer_moment(
    shapes: Sequence[tuple[int, ...]], copies_bytes: int, execution: ExecutionConfig
) -> Moment:
    """Return a :class:`Moment` with the memory in use during the optimizer's step.

    torch's multi-tensor AdamW takes a square root of all second moments at once (``_foreach_sqrt``); other
    optimizers process one tensor after another.
    """
    sizes = [round_to_block(prod(shape) * ADAPTER_ITEMSIZE) for shape in shapes]
    if execution.optimizer == "adamw" and execution.device == "cuda":
        taken = sum(sizes)
    else:
        taken = round_to_block(max(map(prod, shapes), default=0) * step_itemsize(execution))
    items = {"gradients": sum(sizes), "adapter": copies_bytes, "optimizer_step": taken}
    return Moment("optimizer", "optimizer step", items)


class StepTrace(Struct, frozen=True, kw_only=True):
    """The memory that a step takes, as traced from the code that the run executes."""

    transformers: str
    """Version of transformers that ran."""
    resident: dict[str, int]
    """Bytes by item of the tensors that exist throughout a step."""
    moments: tuple[Moment, ...]
    """The fullest moment of each part of a step, without ``resident``."""
    pool: Pool | None
    """Totals of a GPU's allocator over loading and two steps; None on a CPU."""
    uncertain: tuple[str, ...] = ()
    """Parts of the model for which a GPU uses other kernels than the trace, if these are installed."""

    @property
    def step_bytes(self) -> int:
        """Return the bytes of the fullest moment of forward and backward, beyond resident tensors."""
        return max(moment.total_bytes for moment in self.moments if moment.phase != "optimizer")

    def figures(self) -> dict[str, int]:
        """Return the figures under the keys of :func:`.estimate.closed_form`."""
        return {
            "frozen": sum(self.resident.get(key, 0) for key in FROZEN),
            "adapter": self.resident["adapter"],
            "gradients": self.moments[-1].items["gradients"],
            "step": self.step_bytes,
        }
