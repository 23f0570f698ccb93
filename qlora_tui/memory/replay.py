"""Replay of a run's allocations in order, on a model of CUDA's allocator, for the reserved bytes.

The weights and the adapter are loaded and two steps run, because the optimizer's states are created at the
end of the first and lie between the tensors of the second. The bytes alive at the peak do not give the
reserved bytes: a freed block serves another tensor only if it is large enough, and for logits, or the scores
of eager attention, there is often none.

The step's tensors use the blocks that loading leaves free. With quantization transformers first allocates
one tensor of the size of the whole model and frees it, so that the weights are split from one segment
(``caching_allocator_warmup`` in modeling_utils.py). It then reads them in the natural order of their names,
and quantizes each before it reads the next (``convert_and_load_state_dict_in_model`` in
core_model_loading.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.memory.allocator import Blocks, CachingAllocator, MemoryBlock, Pool, Recording
from qlora_tui.memory.execution import ADAPTER_ITEMSIZE, ExecutionConfig
from qlora_tui.memory.layers import Layout
from qlora_tui.memory.ops import FLOAT
from qlora_tui.memory.static_memory import (
    input_bytes,
    mask_bytes,
    state_sizes,
    step_itemsize,
    workspace_bytes,
)
from qlora_tui.memory.step import (
    PartProfile,
    StepProfile,
    adapter_copies,
    layer_input_bytes,
)
from qlora_tui.memory.weights import (
    SLOTS,
    expert_method,
    expert_tensor_sizes,
    four_bit_scale_sizes,
    moves,
    streamed_weights,
)
from qlora_tui.recipe.schema import Quantization, Recipe

READ_BYTES = 2
"""Bytes per weight as read from the file."""
_NUMBERS = re.compile(r"(\d+)")
ENDS, ENDS_THAT_KEEP = 2, 8
"""Periods at either end of a series of equal layers that are replayed in full where blocks are cut to size:
short-lived tensors get the same blocks in all layers between. Over eight families, with and without dropout,
this is within 1 % of the full replay where a layer keeps only its checkpoint, and 2 % where it keeps what it
saves."""
LONGEST_PERIOD = 8
"""Layers after which a family's kinds of layers may repeat: 2 in Gemma 2, 4 in Qwen3-Next, 6 in Gemma 3."""
NOTHING = MemoryBlock(0, 0)
"""Placeholder for a small tensor, which the parts only count."""


def replay(
    layout: Layout,
    step_profile: StepProfile,
    capacity_bytes: int | None = None,
) -> Pool:
    """Load the model and run two steps. An allocator that reaches ``capacity_bytes`` releases free segments
    before it takes more, unless its segments grow."""
    execution = layout.execution
    allocator = CachingAllocator(expandable=execution.expandable_segments, capacity_bytes=capacity_bytes)
    load(allocator, layout)
    run = _Run(allocator, layout, step_profile)
    run.step(first=True)
    run.step(first=False)
    return Pool(allocator.most_allocated_bytes, allocator.most_reserved_bytes)


class _Run:
    """Steps of a run on one allocator."""

    def __init__(
        self,
        allocator: CachingAllocator,
        layout: Layout,
        step_profile: StepProfile,
    ) -> None:
        execution = layout.execution
        self._allocator = allocator
        self._layout = layout
        self._execution = execution
        self._head = step_profile.head.recording
        ends = ENDS if execution.checkpointing and not execution.kept_layers else ENDS_THAT_KEEP
        if not execution.expandable_segments:
            ends = len(step_profile.layers)
        marked = _with_repetitions(step_profile.layers, ends)
        self._layers = [(layer.recording, not is_repeated) for layer, is_repeated in marked]
        self._embedded_bytes = layer_input_bytes(layout)
        self._keeps_embedding = layout.modifies_embedding or not step_profile.layers[0].keeps_input
        self._inputs = (input_bytes(layout), mask_bytes(layout))

    def step(self, *, first: bool) -> None:
        """Replay forward, backward and optimizer. At the end all tensors of the step are freed."""
        allocator = self._allocator
        if first:
            allocator.keep(adapter_copies(self._layout))
        small = allocator.small_bytes
        alive = take_all(allocator, self._inputs)
        if self._layout.modifies_embedding:
            alive.append(allocator.malloc(self._embedded_bytes))
        x = allocator.malloc(self._embedded_bytes)
        if self._keeps_embedding and not self._layout.modifies_embedding:
            alive.append(x)
        if first:
            allocator.malloc(workspace_bytes(self._execution))  # this thread's, with its first product
        owned = not self._keeps_embedding or self._layout.modifies_embedding
        parts: list[Blocks] = []
        for place, (recording, whole) in enumerate(self._layers):
            if place and self._execution.offloads_inputs:
                # The input of the layer before is in host memory by now.
                allocator.free(parts[-1].pop(self._layers[place - 1][0].enters, NOTHING))
            x = self._forward(recording, x, parts, owned=owned, whole=whole)
            owned = not recording.owns_output
        self._forward(self._head, x, parts, owned=owned, whole=True)
        if first:
            allocator.malloc(workspace_bytes(self._execution))  # the workspace of autograd's thread
        gradient = allocator.malloc(FLOAT)  # the gradient of the loss: 1
        fetched: list[MemoryBlock] = []
        for recording, whole in [*self._layers, (self._head, True)][::-1]:
            blocks = parts.pop()
            blocks[recording.seed] = gradient
            if self._execution.offloads_inputs and recording is not self._head:
                # This layer's input, and that of the layer before, ahead of it.
                size = layer_input_bytes(self._layout)
                fetched += [allocator.malloc(size) for _ in range(min(2, len(parts) + 1) - len(fetched))]
                blocks[recording.enters] = fetched.pop(0)
            recording.backward.replay(allocator, blocks, whole=whole)
            gradient = blocks.pop(recording.gradient, NOTHING)
            alive += blocks.values()
        alive.append(gradient)
        alive += self._embedding_backward()
        allocated_bytes = self._optimize(first=first)
        for block in alive:
            allocator.free(block)
        # Small tensors were counted by the parts, not freed one at a time.
        allocator.small_bytes = small + allocated_bytes

    def _embedding_backward(self) -> list[MemoryBlock]:
        """Replay the gradient of a trained embedding; return what is alive after it."""
        layout, execution = self._layout, self._execution
        if not layout.trained_matrix:
            return []
        is_first = layout.own_head and not execution.accumulates
        size = layout.trained_matrix * ADAPTER_ITEMSIZE
        gradients = [self._allocator.malloc(size)] if is_first else []
        for block in take_all(self._allocator, [layout.tokens * layout.hidden * FLOAT] * 3):
            self._allocator.free(block)
        return gradients

    def _forward(
        self, recording: Recording, x: MemoryBlock, parts: list[Blocks], *, owned: bool, whole: bool
    ) -> MemoryBlock:
        """Replay a part's forward; return its output. Without ``owned`` another part frees its input."""
        blocks: Blocks = {recording.enters: x} if owned else {}
        recording.forward.replay(self._allocator, blocks, whole=whole)
        parts.append(blocks)
        if recording.owns_output:
            return blocks.get(recording.leaves, NOTHING)
        return blocks.pop(recording.leaves, NOTHING)

    def _optimize(self, *, first: bool) -> int:
        """Create the optimizer states in the first step, and keep the gradients that are accumulated.

        Returns the bytes of these in small tensors.
        """
        allocator, execution, sizes = self._allocator, self._execution, self._layout.adapter_tensors
        before = allocator.small_bytes
        if first and not execution.pages_states:
            shapes = self._layout.adapter_shapes
            allocator.keep(size for shape in shapes for size in state_sizes(shape, execution))
        if execution.optimizer == "adamw":
            for block in take_all(allocator, (count * ADAPTER_ITEMSIZE for count in sizes)):
                allocator.free(block)
        elif itemsize := step_itemsize(execution):
            for count in sizes:
                allocator.free(allocator.malloc(count * itemsize))
        if first and execution.accumulates:
            allocator.keep(count * ADAPTER_ITEMSIZE for count in sizes)
        return allocator.small_bytes - before


def take_all(allocator: CachingAllocator, sizes: Iterable[int]) -> list[MemoryBlock]:
    """Allocate tensors in order."""
    return [allocator.malloc(size) for size in sizes if size]


def _with_repetitions(layers: tuple[PartProfile, ...], ends: int) -> Iterator[tuple[PartProfile, bool]]:
    """Yield each layer, and whether the layers around it repeat, for ``ends`` periods on either side.

    In most families all layers are equal, and the period is 1; in others it is one of linear attention, three
    of it and one of full attention, or a layer with a window and one without.
    """
    since = {period: _equal_since(layers, period) for period in range(1, LONGEST_PERIOD + 1)}
    for place, layer in enumerate(layers):
        yield (
            layer,
            any(
                place >= period * ends
                and place + period * ends < len(layers)
                and since[period][place + period * ends] <= place - period * ends
                for period in since
            ),
        )


def _equal_since(layers: tuple[PartProfile, ...], period: int) -> list[int]:
    """For each layer, the first one from which on all up to it equal the one ``period`` before them."""
    since: list[int] = []
    for place, layer in enumerate(layers):
        equal = place >= period and layers[place - period] is layer
        since.append(since[-1] if equal else max(place - period + 1, 0))
    return since


def load(
    allocator: CachingAllocator,
    layout: Layout,
) -> None:
    """Load the weights, the casts of unquantized ones, and the adapter."""
    recipe, architecture, execution = layout.recipe, layout.architecture, layout.execution
    weights = _weights(architecture, execution.separate_experts)
    if execution.streamed_layers:
        _place_streamed(allocator, recipe, architecture, execution)
    elif recipe.quantization.method == "none":
        allocator.keep(weight.count * execution.compute_itemsize for weight in weights)
    else:
        quantized = _quantize(allocator, recipe, architecture, execution)
        if execution.cast_to_float32 or execution.compute_itemsize != READ_BYTES:
            for weight in weights:  # one after another, in the model's order
                if weight.name in quantized:
                    allocator.malloc(weight.count * FLOAT)
                    allocator.free(quantized[weight.name])
        if execution.cast_to_float32:
            allocator.empty_cache()  # peft/utils/other.py, after its casts
    for _ in range(2 if recipe.keeps_starting_adapter else 1):
        allocator.keep(count * ADAPTER_ITEMSIZE for count in layout.adapter_tensors)


def _place_streamed(
    allocator: CachingAllocator, recipe: Recipe, architecture: Architecture, execution: ExecutionConfig
) -> None:
    """Allocate the buffers of streamed layers, and then what stays on the device."""
    streamed = streamed_weights(recipe, architecture, execution)
    assert streamed is not None
    slots = min(SLOTS, len(streamed.indices))
    allocator.keep([streamed.slot_bytes // slots] * slots)
    in_host_memory = moves(architecture, recipe)
    packs_experts = expert_method(recipe, architecture, execution) != "none"
    for weight in _weights(architecture, execution.separate_experts):
        if weight.name not in in_host_memory:
            packed = _packed(weight, recipe.quantization, packs_experts=packs_experts)
            allocator.keep(packed or (weight.count * execution.compute_itemsize,))


def _packed(weight: _Weight, settings: Quantization, *, packs_experts: bool) -> tuple[int, ...]:
    """Return the bytes of the tensors of a weight once it is quantized; empty where it stays as read."""
    if weight.experts and packs_experts:
        return expert_tensor_sizes(weight.experts, settings.double_quantization)
    if not weight.rows or settings.method == "none":
        return ()
    if settings.method == "int8":
        return (weight.rows * FLOAT, weight.count)
    return (*four_bit_scale_sizes(weight.count, settings.double_quantization), -(-weight.count // 2))


def _quantize(
    allocator: CachingAllocator, recipe: Recipe, architecture: Architecture, execution: ExecutionConfig
) -> dict[str, MemoryBlock]:
    """Load and quantize the weights; return the blocks of those that stay as read."""
    weights = _in_natural_order(architecture, execution.separate_experts)
    a_weight = 1.0 if recipe.quantization.method == "int8" else 0.5
    packs_experts = expert_method(recipe, architecture, execution) != "none"
    whole = 0.0
    for weight in weights:
        is_packed = weight.rows or (weight.experts and packs_experts)
        whole += weight.count * (a_weight if is_packed else READ_BYTES)
    allocator.free(allocator.malloc(int(whole)))
    quantized: dict[str, MemoryBlock] = {}
    for weight in weights:
        packed = _packed(weight, recipe.quantization, packs_experts=packs_experts)
        # Experts one matrix at a time, in the same memory (training/experts/loading.py).
        matrices = weight.experts[0] if weight.experts and packs_experts else 1
        read = allocator.malloc(weight.count // matrices * READ_BYTES)
        if packed:
            allocator.keep(packed)
            allocator.free(read)
        else:
            quantized[weight.name] = read
    return quantized


@dataclass(frozen=True)
class _Weight:
    name: str
    count: int
    rows: int
    """Outputs of a linear weight that can be quantized; 0 for any other."""
    experts: tuple[int, ...] = ()
    """Shape of fused experts: matrices of equal shape, rows, columns; empty for any other weight."""


@lru_cache(maxsize=16)
def _weights(architecture: Architecture, separate_experts: bool) -> tuple[_Weight, ...]:
    """Return every parameter, in the model's order as far as it is known: norms come last."""
    weights = [_Weight(table.name, table.params, 0) for table in architecture.embeddings]
    for module in architecture.modules:
        rows = module.out_features if module.quantizable else 0
        weights.append(_Weight(f"{module.name}.weight", module.weight_params, rows))
        if module.bias_params:
            weights.append(_Weight(f"{module.name}.bias", module.bias_params, 0))
    for parameter in architecture.parameters:
        rows = parameter.shape[0] if parameter.role == "expert" and separate_experts else 0
        shape = parameter.shape if parameter.is_expert_matrices else ()
        weights.append(_Weight(parameter.name, parameter.params, rows, shape))
    if architecture.head.own_params:
        weights.append(_Weight(architecture.head.name, architecture.head.own_params, 0))
    return tuple(weights)


@lru_cache(maxsize=16)
def _in_natural_order(architecture: Architecture, separate_experts: bool) -> tuple[_Weight, ...]:
    """Return the parameters by name, in natural order: numbers in names compare as numbers."""

    def natural(weight: _Weight) -> list[int | str]:
        parts: list[int | str] = [*_NUMBERS.split(weight.name)]
        parts[1::2] = map(int, parts[1::2])
        return parts

    return tuple(sorted(_weights(architecture, separate_experts), key=natural))
