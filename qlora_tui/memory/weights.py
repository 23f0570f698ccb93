"""The frozen weights: which of them are in 4 bits, the sizes of their tensors, and the streamed layers.

Streamed layers are kept in host memory and copied in turn to two buffers of the device
(``training/streaming``), each as large as the largest layer. Norms, biases, adapters, embeddings and head
stay on the device.

Sources: bitsandbytes ``functional.py`` (``quantize_4bit`` with blocks of 64, ``quantize_blockwise`` with
blocks of 256 for the scales of a double quantization), and ``training/experts/storage.py``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from msgspec import structs

from qlora_tui.catalog.architecture_types import Architecture, LinearModule, Parameter
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.memory.execution import ExecutionConfig
from qlora_tui.recipe.schema import Quantization, Recipe
from qlora_tui.recipe.targets import matches

ALLOCATION_BYTES = 512
"""Granularity to which the CUDA caching allocator rounds blocks up (``kMinBlockSize``)."""
BLOCK = 64
"""Number of weights that share one scale (``blocksize`` of Linear4bit)."""
NESTED_BLOCK = 256
"""Number of scales that share one second-level scale, with double quantization."""
CODE_BYTES = 16 * 4
"""Bytes of the sixteen values of NF4 or FP4, which each module stores."""
NESTED_CODE_BYTES = 256 * 4


def quantizes(settings: Quantization, module: LinearModule) -> bool:
    """Return whether this module's weight is quantized, if ``settings.method`` is not ``none``."""
    return module.quantizable and not (settings.skip and matches(settings.skip, module))


@lru_cache(maxsize=256)
def four_bit_scale_sizes(weights: int, nested: bool) -> tuple[int, ...]:
    """Return the bytes of each tensor of scales and code tables in one 4-bit module."""
    blocks = -(-weights // BLOCK)
    if not nested:
        return (blocks * 4, CODE_BYTES)
    return (blocks, -(-blocks // NESTED_BLOCK) * 4, CODE_BYTES, NESTED_CODE_BYTES, 4)


def expert_method(
    recipe: Recipe, architecture: Architecture, execution: ExecutionConfig
) -> Literal["nf4", "fp4", "none"]:
    """Return how the trainer stores fused experts. Only the trainer of this project quantizes them."""
    return quantized_experts(recipe.quantization, architecture) if execution.own_fused else "none"


def expert_tensor_sizes(shape: tuple[int, ...], nested: bool) -> tuple[int, ...]:
    """Return the bytes of each tensor of a stack of 4-bit matrices: weights, then scales.

    ``shape`` is (experts, rows, columns). Code tables are shared by all modules.
    """
    experts, weights = shape[0], shape[1] * shape[2]
    packed, blocks = -(-weights // 2), -(-weights // BLOCK)
    if not nested:
        return (experts * packed, experts * blocks * 4)
    return (experts * packed, experts * blocks, experts * -(-blocks // NESTED_BLOCK) * 4, experts * 4)


PACKED_EXPERTS = ("gate_up_proj", "down_proj")
"""Names of expert parameters in the form that our function can compute in 4 bits.

Experts with other parameters stay in 16 bits, such as those of Nemotron H, which have no gate.
"""


def quantized_experts(settings: Quantization, architecture: Architecture) -> Literal["nf4", "fp4", "none"]:
    """Return how the fused experts of a mixture are quantized.

    ``none`` also for a model without experts, and for files that bitsandbytes has already quantized: these
    hold the experts as bitsandbytes left them.
    """
    if (
        settings.method not in ("nf4", "fp4")
        or not settings.experts
        or architecture.experts is None
        or architecture.quantized_as == "bitsandbytes"
    ):
        return "none"
    first = next((parameter for parameter in architecture.parameters if parameter.is_expert_matrices), None)
    return settings.method if first is not None and first.name.endswith(PACKED_EXPERTS) else "none"


def require_4_bit_experts(settings: Quantization, architecture: Architecture) -> None:
    """Raise UserError if experts that are stored in MXFP4 would be loaded in 16 bits."""
    if architecture.quantized_as != "mxfp4" or quantized_experts(settings, architecture) != "none":
        return
    is_method = settings.method not in ("nf4", "fp4")
    setting = f'method is "{settings.method}"' if is_method else "experts is false"
    remedy = 'method = "nf4"' if is_method else "experts = true"
    raise UserError(
        "This model's experts need 4 bits",
        what=f"quantization.{setting}, but the model stores its experts in 4-bit floats (MXFP4).",
        why="The experts are loaded in 4 bits, one by one. In 16 bits, they would take four times the "
        "memory.",
        fix=f"Set quantization.{remedy}.",
        exit_code=EXIT_USAGE,
    )


def round_to_block(size: int) -> int:
    """Round up to the allocator's block size."""
    return -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES


def frozen_weights(recipe: Recipe, architecture: Architecture, execution: ExecutionConfig) -> dict[str, int]:
    """Return the bytes of the whole base model by item, in the dtypes that it has during training.

    The items are ``weights`` (those that are quantized) and their ``scales``, which include code tables;
    ``linear``, weights and biases that are not quantized; ``experts``, fused experts with their scales;
    ``embedding``; ``head``; ``vision``; and ``norms``, which includes routers, convolutions and other
    parameters.
    """
    method, nested = recipe.quantization.method, recipe.quantization.double_quantization
    itemsize = execution.residual_itemsize
    items = dict.fromkeys(("weights", "scales", "linear", "norms", "experts", "vision"), 0)
    items["embedding"] = sum(round_to_block(table.params * itemsize) for table in architecture.embeddings)
    items["head"] = round_to_block(architecture.head.own_params * itemsize)

    def add(item: str, count: int, *sizes: int) -> None:
        items[item] += count * sum(map(round_to_block, sizes))

    # A model has hundreds of modules and parameters, but few different ones.
    kinds: dict[tuple[object, ...], tuple[LinearModule, int]] = {}
    for module in architecture.modules:
        is_vision = module.part == "vision"
        key = (
            *(module.in_features, module.out_features, module.bias),
            *(quantizes(recipe.quantization, module), is_vision),
        )
        kinds[key] = (module, kinds[key][1] + 1 if key in kinds else 1)
    for module, count in kinds.values():
        weights, is_quantized = module.weight_params, quantizes(recipe.quantization, module)
        if is_quantized and method in ("nf4", "fp4"):
            add("weights", count, -(-weights // 2))
            add("scales", count, *four_bit_scale_sizes(weights, nested))
        elif is_quantized and method == "int8":
            add("weights", count, weights)
            add("scales", count, module.out_features * 4)
        else:
            add("vision" if module.part == "vision" else "linear", count, weights * itemsize)
        add("linear", count, module.bias_params * itemsize)
    separate = execution.separate_experts and method in ("nf4", "fp4")
    stacked = expert_method(recipe, architecture, execution) != "none"
    shapes: dict[tuple[str, tuple[int, ...]], tuple[Parameter, int]] = {}
    for parameter in architecture.parameters:
        shape = (parameter.role, parameter.shape)
        shapes[shape] = (parameter, shapes[shape][1] + 1 if shape in shapes else 1)
    for parameter, count in shapes.values():
        if parameter.role == "expert" and separate:
            add("weights", count, -(-parameter.params // 2))
            add("scales", count, *four_bit_scale_sizes(parameter.params, nested))
        elif parameter.is_expert_matrices and stacked:
            add("experts", count, *expert_tensor_sizes(parameter.shape, nested))
        else:
            item = {"expert": "experts", "vision": "vision"}.get(parameter.role, "norms")
            add(item, count, parameter.params * itemsize)
    return items


SLOTS = 2
"""Number of device buffers to which streamed layers are copied in turn."""
_MIN_DIMENSIONS = 2
"""Minimum number of dimensions of a parameter that is moved to host memory; norms have one dimension."""


@dataclass(frozen=True)
class StreamedWeights:
    """Memory of the streamed layers."""

    indices: tuple[int, ...]
    """The streamed layers, in order."""
    host_bytes: int
    """Bytes of host memory that hold the layers."""
    slot_bytes: int
    """Bytes of the device buffers to which the layers are copied."""
    items: dict[str, int]
    """Bytes of each item of the estimate that are in host memory instead of on a GPU."""


def streamed_indices(layers: int, count: int) -> tuple[int, ...]:
    """Return the indices of ``count`` layers that are evenly spaced among ``layers`` layers.

    A copy can then run while the layers between two streamed ones compute.
    """
    count = min(count, layers)
    return tuple((2 * number + 1) * layers // (2 * count) for number in range(count))


def streamed_weights(
    recipe: Recipe, architecture: Architecture, execution: ExecutionConfig
) -> StreamedWeights | None:
    """Return the memory of the streamed layers; None if the recipe streams none."""
    indices = streamed_indices(architecture.layers, recipe.quantization.streamed_layers)
    if not indices:
        return None
    by_layer = _weights_by_layer(recipe.quantization, architecture, execution)
    items: Counter[str] = Counter()
    for index in indices:
        items.update(by_layer[index])
    sizes = [sum(by_layer[index].values()) for index in indices]
    return StreamedWeights(indices, sum(sizes), min(SLOTS, len(sizes)) * max(sizes), dict(items))


def moves(architecture: Architecture, recipe: Recipe) -> frozenset[str]:
    """Return the full names of the parameters that are in host memory."""
    indices = set(streamed_indices(architecture.layers, recipe.quantization.streamed_layers))
    modules = {f"{m.name}.weight" for m in architecture.modules if m.layer in indices and m.part != "vision"}
    return frozenset(
        modules
        | {
            parameter.name
            for parameter in architecture.parameters
            if parameter.layer in indices and _parameter_moves(parameter.role, parameter.shape)
        }
    )


@lru_cache(maxsize=16)
def _weights_by_layer(
    quantization: Quantization, architecture: Architecture, execution: ExecutionConfig
) -> tuple[dict[str, int], ...]:
    """Return, for each layer, the bytes of its weights that can be streamed, by item of the estimate."""
    recipe = Recipe(quantization=quantization)
    by_layer = []
    for index in range(architecture.layers):
        layer = structs.replace(
            architecture,
            modules=tuple(
                structs.replace(module, bias=False)
                for module in architecture.modules
                if module.layer == index and module.part != "vision"
            ),
            embeddings=(),
            parameters=tuple(
                parameter
                for parameter in architecture.parameters
                if parameter.layer == index and _parameter_moves(parameter.role, parameter.shape)
            ),
        )
        items = frozen_weights(recipe, layer, execution)
        movable = ("weights", "scales", "linear", "norms", "experts")
        by_layer.append({key: items[key] for key in movable if items[key]})
    return tuple(by_layer)


def _parameter_moves(role: str, shape: tuple[int, ...]) -> bool:
    return role != "vision" and len(shape) >= _MIN_DIMENSIONS
