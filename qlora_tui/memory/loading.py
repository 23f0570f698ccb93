"""Loading of the model into the allocator: the step's tensors use the blocks that loading leaves free.

With quantization transformers first allocates one tensor of the size of the whole model and frees it, so that
the weights are split from one segment (``caching_allocator_warmup`` in modeling_utils.py). It then reads them
in the natural order of their names, and quantizes each before it reads the next
(``convert_and_load_state_dict_in_model`` in core_model_loading.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.memory.allocator import CachingAllocator, MemoryBlock
from qlora_tui.memory.execution import ExecutionConfig
from qlora_tui.memory.four_bit import expert_method, expert_tensor_sizes, four_bit_scale_sizes
from qlora_tui.memory.layout import Layout
from qlora_tui.memory.ops import FLOAT
from qlora_tui.memory.streamed_layers import SLOTS, moves, streamed_weights
from qlora_tui.recipe.schema import Recipe

READ_BYTES = 2
"""Bytes per weight as read from the file."""


@dataclass(frozen=True)
class _Weight:
    name: str
    count: int
    rows: int
    """Outputs of a linear weight that can be quantized; 0 for any other."""
    experts: tuple[int, ...] = ()
    """Shape of fused experts: matrices of equal shape, rows, columns; empty for any other weight."""


def load(
    allocator: CachingAllocator,
    recipe: Recipe,
    architecture: Architecture,
    layout: Layout,
    execution: ExecutionConfig,
) -> None:
    """Load the weights, the casts of unquantized ones, and the adapter."""
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
        allocator.keep(count * execution.adapter_itemsize for count in layout.adapter_tensors)


def _place_streamed(
    allocator: CachingAllocator, recipe: Recipe, architecture: Architecture, execution: ExecutionConfig
) -> None:
    """Allocate the buffers of streamed layers, and then what stays on the device."""
    streamed = streamed_weights(recipe, architecture, execution)
    assert streamed is not None
    slots = min(SLOTS, len(streamed.indices))
    allocator.keep([streamed.slot_bytes // slots] * slots)
    in_host_memory = moves(architecture, recipe)
    method, nested = recipe.quantization.method, recipe.quantization.double_quantization
    for weight in _weights(architecture, execution.separate_experts):
        if weight.name in in_host_memory:
            continue
        if weight.experts and expert_method(recipe, architecture, execution) != "none":
            allocator.keep(expert_tensor_sizes(weight.experts, nested))
        elif not weight.rows or method == "none":
            allocator.keep((weight.count * execution.compute_itemsize,))
        elif method == "int8":
            allocator.keep((weight.rows * FLOAT, weight.count))
        else:
            allocator.keep((*four_bit_scale_sizes(weight.count, nested), -(-weight.count // 2)))


def _quantize(
    allocator: CachingAllocator, recipe: Recipe, architecture: Architecture, execution: ExecutionConfig
) -> dict[str, MemoryBlock]:
    """Load and quantize the weights; return the blocks of those that stay as read."""
    method, nested = recipe.quantization.method, recipe.quantization.double_quantization
    weights = _in_natural_order(architecture, execution.separate_experts)
    a_weight = 1.0 if method == "int8" else 0.5
    packs_experts = expert_method(recipe, architecture, execution) != "none"
    whole = 0.0
    for weight in weights:
        is_packed = weight.rows or (weight.experts and packs_experts)
        whole += weight.count * (a_weight if is_packed else READ_BYTES)
    allocator.free(allocator.malloc(int(whole)))
    quantized: dict[str, MemoryBlock] = {}
    for weight in weights:
        if weight.experts and packs_experts:
            # One matrix at a time, in the same memory (training/experts/expert_loading.py).
            read = allocator.malloc(weight.count // weight.experts[0] * READ_BYTES)
            allocator.keep(expert_tensor_sizes(weight.experts, nested))
            allocator.free(read)
            continue
        read = allocator.malloc(weight.count * READ_BYTES)
        if not weight.rows:
            quantized[weight.name] = read
            continue
        if method == "int8":
            scales: tuple[int, ...] = (weight.rows * FLOAT,)
        else:
            scales = four_bit_scale_sizes(weight.count, nested)
        allocator.keep((*scales, -(-weight.count // 2) if method != "int8" else weight.count))
        allocator.free(read)
    return quantized


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
    return tuple(sorted(_weights(architecture, separate_experts), key=_natural))


_NUMBERS = re.compile(r"(\d+)")


def _natural(weight: _Weight) -> list[int | str]:
    parts: list[int | str] = [*_NUMBERS.split(weight.name)]
    parts[1::2] = map(int, parts[1::2])
    return parts
