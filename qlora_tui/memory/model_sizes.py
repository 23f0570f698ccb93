"""The largest model size that fits with a recipe; Qwen2.5's shapes represent each class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from msgspec import structs

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.memory.estimate import Estimate, estimate
from qlora_tui.memory.execution import Device
from qlora_tui.memory.verdict import check_fit
from qlora_tui.recipe.schema import ALL_LINEAR, Recipe

_SHAPES = (
    ("0.5B", 896, 4864, 24, 14, 2, 151_936, True),
    ("1.5B", 1536, 8960, 28, 12, 2, 151_936, True),
    ("3B", 2048, 11_008, 36, 16, 2, 151_936, True),
    ("7B", 3584, 18_944, 28, 28, 4, 152_064, False),
    ("14B", 5120, 13_824, 48, 40, 8, 152_064, False),
    ("32B", 5120, 27_648, 64, 40, 8, 152_064, False),
    ("72B", 8192, 29_568, 80, 64, 8, 152_064, False),
)


@dataclass(frozen=True)
class ModelClass:
    """One model size under the recipe."""

    label: str
    """Name of the class: ``7B``."""
    estimate: Estimate


def largest_model_size(
    recipe: Recipe, available_bytes: int, *, device: Device | None = None
) -> ModelClass | None:
    """Return the largest class that fits; None when not even the smallest does.

    Target modules are assumed ``all-linear``, because another model has other modules.
    """
    all_linear = structs.replace(recipe, lora=structs.replace(recipe.lora, target_modules=(ALL_LINEAR,)))
    largest = None
    for label, *_ in _SHAPES:
        result = estimate(all_linear, _architecture(label), device=device)
        if not check_fit(result, available_bytes).fits_even_if_tight:
            break
        largest = ModelClass(label, result)
    return largest


@lru_cache
def _architecture(label: str) -> Architecture:
    shape = next(shape for shape in _SHAPES if shape[0] == label)
    _, hidden, inner, layers, heads, kv_heads, vocabulary, tied = shape
    return parse_architecture(
        {
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": 32_768,
            "hidden_act": "silu",
            "tie_word_embeddings": tied,
        }
    )
