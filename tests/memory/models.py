"""Configs of real models, as far as their shapes go."""

from __future__ import annotations

from typing import Any

from qlora_tui.catalog.architecture import read_architecture
from qlora_tui.catalog.facts import Architecture

TINYLLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def tinyllama() -> Architecture:
    return read_architecture(TINYLLAMA)


def qwen_7b() -> Architecture:
    return read_architecture(QWEN_7B)
