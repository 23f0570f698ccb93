"""Which decoder layers wait in host memory, and what they take there and on the device.

Their frozen weights pass through two buffers of the device (``training/streaming``), each as large as the
largest of them. Norms, biases, adapters, embeddings and head stay on the device.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from msgspec import structs

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.memory.execution import ExecutionConfig
from qlora_tui.memory.parameter_memory import FrozenWeights, frozen_weights
from qlora_tui.recipe.schema import Quantization, Recipe

SLOTS = 2
"""Buffers of the device that streamed layers pass through in turn."""
_MIN_DIMENSIONS = 2
"""Dimensions from which a parameter moves: norms have one."""


@dataclass(frozen=True)
class StreamedWeights:
    """Memory of the streamed layers."""

    indices: tuple[int, ...]
    """The streamed layers, in order."""
    host_bytes: int
    """Host memory that holds them."""
    slot_bytes: int
    """Buffers of the device that they pass through."""
    items: dict[str, int]
    """Bytes of each item of the estimate that are in host memory instead of on a GPU."""


def streamed_indices(layers: int, count: int) -> tuple[int, ...]:
    """Return ``count`` of ``layers`` layers, at equal distances.

    Between two of them a copy has the time in which the layers between compute.
    """
    count = min(count, layers)
    return tuple((2 * number + 1) * layers // (2 * count) for number in range(count))


def streamed_weights(
    recipe: Recipe, architecture: Architecture, execution: ExecutionConfig
) -> StreamedWeights | None:
    """Return the memory of the streamed layers; None where the recipe streams none."""
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
    """Return the bytes of the weights of each layer that can move, by item of the estimate."""
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
        by_layer.append(_items(frozen_weights(recipe, layer, execution)))
    return tuple(by_layer)


def _items(weights: FrozenWeights) -> dict[str, int]:
    items = {
        "weights": weights.packed_bytes,
        "scales": weights.scale_bytes,
        "linear": weights.dense_bytes,
        "norms": weights.norm_and_other_bytes,
        "experts": weights.expert_bytes,
    }
    return {key: size for key, size in items.items() if size}


def _parameter_moves(role: str, shape: tuple[int, ...]) -> bool:
    return role != "vision" and len(shape) >= _MIN_DIMENSIONS
