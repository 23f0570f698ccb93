"""Models worth starting with: chat models that anyone may download and use, from small to large.

Home lists those that fit to a user who has none. Each has the shapes of its ``config.json``, so that its
memory is estimated before anything is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import parse_architecture

_QWEN_CONTEXT = 32_768
_QWEN3_CONTEXT = 40_960


@dataclass(frozen=True, kw_only=True)
class StarterModel:
    """A model on the Hub; the sizes are those of its ``config.json``."""

    id: str
    license: str
    """SPDX identifier, lower case as on the Hub."""
    family: str
    """``model_type``."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    tied: bool
    """Whether the output head is the embedding."""
    head_dim: int | None = None
    """None where it is hidden size / heads."""

    def architecture(self) -> Architecture:
        """Its linear modules and other parameters."""
        config: dict[str, Any] = {
            "model_type": self.family,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": self.tied,
        }
        if self.head_dim is not None:
            config["head_dim"] = self.head_dim
        return parse_architecture(config)


def _qwen2(size: str, shape: tuple[int, int, int, int, int], vocabulary: int, *, tied: bool) -> StarterModel:
    hidden, intermediate, layers, heads, kv_heads = shape
    return StarterModel(
        id=f"Qwen/Qwen2.5-{size}-Instruct",
        license="apache-2.0",
        family="qwen2",
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=vocabulary,
        context=_QWEN_CONTEXT,
        tied=tied,
    )


def _qwen3(size: str, shape: tuple[int, int, int, int], *, tied: bool) -> StarterModel:
    hidden, intermediate, layers, heads = shape
    return StarterModel(
        id=f"Qwen/Qwen3-{size}",
        license="apache-2.0",
        family="qwen3",
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=8,
        vocabulary=151_936,
        context=_QWEN3_CONTEXT,
        tied=tied,
        head_dim=128,
    )


STARTER_MODELS = (
    _qwen2("0.5B", (896, 4_864, 24, 14, 2), 151_936, tied=True),
    _qwen3("0.6B", (1_024, 3_072, 28, 16), tied=True),
    StarterModel(
        id="HuggingFaceTB/SmolLM2-1.7B-Instruct",
        license="apache-2.0",
        family="llama",
        hidden=2_048,
        intermediate=8_192,
        layers=24,
        heads=32,
        kv_heads=32,
        vocabulary=49_152,
        context=8_192,
        tied=True,
    ),
    _qwen3("1.7B", (2_048, 6_144, 28, 16), tied=True),
    _qwen3("4B", (2_560, 9_728, 36, 32), tied=True),
    _qwen2("7B", (3_584, 18_944, 28, 28, 4), 152_064, tied=False),
    _qwen3("8B", (4_096, 12_288, 36, 32), tied=False),
    _qwen2("14B", (5_120, 13_824, 48, 40, 8), 152_064, tied=False),
    _qwen2("32B", (5_120, 27_648, 64, 40, 8), 152_064, tied=False),
)
"""From the smallest to the largest."""
