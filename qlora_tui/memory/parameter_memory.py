"""Memory that is constant through the run: the frozen model, the adapter, the optimizer's states.

Sources: bitsandbytes ``optim/optimizer.py`` (8-bit states from 4,096 elements on, ``min_8bit_size``), QLoRA
(arXiv 2305.14314, section 3).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from qlora_tui.catalog.architecture_types import Architecture, LinearModule, Parameter
from qlora_tui.memory.autograd import ALLOCATION_BYTES
from qlora_tui.memory.execution import ExecutionConfig
from qlora_tui.memory.four_bit import expert_method, expert_tensor_sizes, four_bit_scale_sizes
from qlora_tui.memory.layout import Layout
from qlora_tui.recipe.schema import Recipe

SMALL_TENSOR = 4096
"""Elements below which bitsandbytes uses 32-bit optimizer states for a tensor."""
STATE_BLOCK = 256
STEP_ITEMSIZE: dict[str, int] = {"adamw": 4, "adafactor": 12}
"""Bytes per element of a tensor during its step: AdamW's square root; Adafactor's squared gradient and the
two factors of its update."""

CPU_STEP_ITEMSIZE: dict[str, int] = {
    **dict.fromkeys(("adamw_8bit", "paged_adamw_8bit", "lion_8bit"), 20),
    **dict.fromkeys(("paged_adamw_32bit", "lion"), 12),
}
"""As ``STEP_ITEMSIZE``, on a CPU, where bitsandbytes 0.50 computes in torch: 8-bit states are dequantized.
Measured as the growth of the process at the step of a matrix with 28 million elements."""


def step_itemsize(execution: ExecutionConfig) -> int:
    """Return the bytes per element of a tensor during its optimizer step."""
    itemsizes = STEP_ITEMSIZE | CPU_STEP_ITEMSIZE if execution.device == "cpu" else STEP_ITEMSIZE
    return itemsizes.get(execution.optimizer, 0)


def round_to_block(size: int) -> int:
    """Round up to the allocator's block size."""
    return -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES


@dataclass(frozen=True)
class FrozenWeights:
    """Bytes of the frozen model, by kind."""

    packed_bytes: int
    """Quantized linear weights."""
    scale_bytes: int
    """Scales, nested scales and code tables of the quantized weights."""
    dense_bytes: int
    """Linear weights and biases kept in 16 bits (or more)."""
    embedding_bytes: int
    head_bytes: int
    norm_and_other_bytes: int
    """Norms, MoE routers, convolutions and other parameters that are not quantized."""
    expert_bytes: int
    """Fused experts: in 16 bits (or more), or quantized, with their scales."""
    vision_bytes: int

    @property
    def total_bytes(self) -> int:
        """Return the bytes of the whole model."""
        return sum(vars(self).values())


def frozen_weights(recipe: Recipe, architecture: Architecture, execution: ExecutionConfig) -> FrozenWeights:
    """Compute the bytes of every base model parameter, in the dtype it has during training."""
    method, nested = recipe.quantization.method, recipe.quantization.double_quantization
    packed = scales = dense = vision = 0
    itemsize = 4 if execution.cast_to_float32 else execution.compute_itemsize
    # A model has hundreds of modules, but few that differ.
    kinds: dict[tuple[object, ...], tuple[LinearModule, int]] = {}
    for module in architecture.modules:
        is_vision = module.part == "vision"
        key = (module.in_features, module.out_features, module.bias, module.quantizable, is_vision)
        kinds[key] = (module, kinds[key][1] + 1 if key in kinds else 1)
    for module, count in kinds.values():
        weights, rows = module.weight_params, module.out_features
        if module.quantizable and method in ("nf4", "fp4"):
            packed += count * round_to_block(-(-weights // 2))
            scales += count * four_bit_scale_bytes(weights, nested)
        elif module.quantizable and method == "int8":
            packed += count * round_to_block(weights)
            scales += count * round_to_block(rows * 4)
        elif module.part == "vision":
            vision += count * round_to_block(weights * itemsize)
        else:
            dense += count * round_to_block(weights * itemsize)
        dense += count * round_to_block(module.bias_params * itemsize)
    roles = {"expert": 0, "vision": 0, "other": 0}
    separate = execution.separate_experts and method in ("nf4", "fp4")
    stacked = expert_method(recipe, architecture, execution) != "none"
    shapes: dict[tuple[str, tuple[int, ...]], tuple[Parameter, int]] = {}
    for parameter in architecture.parameters:
        shape = (parameter.role, parameter.shape)
        shapes[shape] = (parameter, shapes[shape][1] + 1 if shape in shapes else 1)
    for parameter, count in shapes.values():
        if parameter.role == "expert" and separate:
            packed += count * round_to_block(-(-parameter.params // 2))
            scales += count * four_bit_scale_bytes(parameter.params, nested)
        elif parameter.is_expert_matrices and stacked:
            sizes = expert_tensor_sizes(parameter.shape, nested)
            roles["expert"] += count * sum(map(round_to_block, sizes))
        else:
            role = parameter.role if parameter.role in roles else "other"
            roles[role] += count * round_to_block(parameter.params * itemsize)
    return FrozenWeights(
        packed_bytes=packed,
        scale_bytes=scales,
        dense_bytes=dense,
        embedding_bytes=sum(round_to_block(table.params * itemsize) for table in architecture.embeddings),
        head_bytes=round_to_block(architecture.head.own_params * itemsize),
        norm_and_other_bytes=roles["other"],
        expert_bytes=roles["expert"],
        vision_bytes=vision + roles["vision"],
    )


def four_bit_scale_bytes(weights: int, nested: bool) -> int:
    """Return the bytes of scales and code tables of one 4-bit module."""
    return sum(round_to_block(size) for size in four_bit_scale_sizes(weights, nested))


def adapter_bytes(layout: Layout, execution: ExecutionConfig) -> int:
    """Return the bytes of the trained matrices."""
    sizes = Counter(layout.adapter_tensors).items()
    return sum(times * round_to_block(count * execution.adapter_itemsize) for count, times in sizes)


def gradient_bytes(layout: Layout, execution: ExecutionConfig) -> int:
    """Return the bytes of the gradients, which have their parameters' dtype."""
    return adapter_bytes(layout, execution)


def optimizer_bytes(layout: Layout, execution: ExecutionConfig) -> int:
    """Return the bytes of all states. Paged states take the same bytes in managed memory."""
    return sum(
        times * _state_bytes(shape, execution) for shape, times in Counter(layout.adapter_shapes).items()
    )


def _state_bytes(shape: tuple[int, ...], execution: ExecutionConfig) -> int:
    return sum(round_to_block(size) for size in state_sizes(shape, execution))


def state_sizes(shape: tuple[int, ...], execution: ExecutionConfig) -> tuple[int, ...]:
    """Return the bytes of each state of one trained tensor: moments, and the scales of 8-bit ones.

    AdamW has two moments; Lion (bitsandbytes ``lion.py``) has one; of Adafactor's second moment transformers
    keeps the means of rows and columns, and a scalar.
    """
    count, optimizer = prod(shape), execution.optimizer
    moments = 1 if optimizer in ("lion", "lion_8bit") else 2
    if "8bit" in optimizer and count >= SMALL_TENSOR:
        return (*[count] * moments, *[-(-count // STATE_BLOCK) * 4] * moments)
    if optimizer == "adafactor":
        return (*[size * 4 for size in shape], 4)
    in_adapter_dtype = optimizer.startswith("adamw") and "8bit" not in optimizer
    return (count * (execution.adapter_itemsize if in_adapter_dtype else 4),) * moments


def optimizer_step_bytes(layout: Layout, execution: ExecutionConfig) -> int:
    """Return the temporary bytes of one optimizer step: torch's multi-tensor AdamW takes a square root of all
    second moments at once (``_foreach_sqrt``); fused and bitsandbytes kernels need none on a GPU. Others take
    one tensor after the other."""
    if execution.optimizer == "adamw" and execution.device == "cuda":
        return adapter_bytes(layout, execution)
    largest = max(layout.adapter_tensors, default=0)
    return round_to_block(largest * step_itemsize(execution))
