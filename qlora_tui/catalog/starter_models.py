"""Models worth starting with: chat models that anyone may download and use, from small to large.

Home lists those that fit to a user who has none. Each has the shapes of its ``config.json``, so that its
memory is estimated before anything is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import parse_architecture

_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings"),
)
_QWEN2: dict[str, Any] = {"model_type": "qwen2"}
_QWEN3: dict[str, Any] = {"model_type": "qwen3", "head_dim": 128}


@dataclass(frozen=True)
class StarterModel:
    """A model on the Hub; the sizes are those of its ``config.json``."""

    id: str
    license: str
    """SPDX identifier, lower case as on the Hub."""
    sizes: tuple[int, ...]
    """Values of ``_SIZES``."""
    tied: bool
    """Whether the output head is the embedding."""
    family: dict[str, Any]
    """Other keys of the config."""

    def architecture(self) -> Architecture:
        """Its linear modules and other parameters."""
        sizes = dict(zip(_SIZES, self.sizes, strict=True))
        return parse_architecture({**sizes, **self.family, "tie_word_embeddings": self.tied})


def _qwen(name: str, sizes: tuple[int, ...], tied: bool, family: dict[str, Any]) -> StarterModel:
    return StarterModel(f"Qwen/{name}", "apache-2.0", sizes, tied, family)


STARTER_MODELS = (
    _qwen("Qwen2.5-0.5B-Instruct", (896, 4864, 24, 14, 2, 151_936, 32_768), True, _QWEN2),
    _qwen("Qwen3-0.6B", (1024, 3072, 28, 16, 8, 151_936, 40_960), True, _QWEN3),
    StarterModel(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "apache-2.0",
        (2048, 8192, 24, 32, 32, 49_152, 8192),
        True,
        {"model_type": "llama"},
    ),
    _qwen("Qwen3-1.7B", (2048, 6144, 28, 16, 8, 151_936, 40_960), True, _QWEN3),
    _qwen("Qwen3-4B", (2560, 9728, 36, 32, 8, 151_936, 40_960), True, _QWEN3),
    _qwen("Qwen2.5-7B-Instruct", (3584, 18_944, 28, 28, 4, 152_064, 32_768), False, _QWEN2),
    _qwen("Qwen3-8B", (4096, 12_288, 36, 32, 8, 151_936, 40_960), False, _QWEN3),
    _qwen("Qwen2.5-14B-Instruct", (5120, 13_824, 48, 40, 8, 152_064, 32_768), False, _QWEN2),
    _qwen("Qwen2.5-32B-Instruct", (5120, 27_648, 64, 40, 8, 152_064, 32_768), False, _QWEN2),
)
"""From the smallest to the largest."""
