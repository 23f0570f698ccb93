"""Types of GGUF files: which there are, who writes them, and how large they become."""

from __future__ import annotations

from typing import Literal, TypeAlias

from qlora_tui.catalog.architecture_types import Architecture

FileType: TypeAlias = Literal["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
FILE_TYPES: tuple[FileType, ...] = ("BF16", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types that the ``gguf`` package writes, the largest first."""
K_QUANTS = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")
"""Types that llama.cpp itself writes, the largest first."""
AUTO = "auto"
"""The smallest type whose answers are near enough to the adapter's."""
LADDER = ("Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
"""Types that ``auto`` tries, the smallest first."""

_BITS_PER_WEIGHT = {
    "F16": 16.0,
    "BF16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.56,
    "Q5_1": 6.0,
    "Q5_K_M": 5.7,
    "Q5_K_S": 5.57,
    "Q5_0": 5.5,
    "Q4_1": 5.0,
    "Q4_K_M": 4.89,
    "Q4_K_S": 4.67,
    "Q4_0": 4.5,
    "Q3_K_L": 4.3,
    "Q3_K_M": 4.0,
    "Q3_K_S": 3.64,
    "Q2_K": 3.16,
}
"""K types: measured on Llama 3.1 8B (llama.cpp, tools/quantize/README.md); others: from their blocks."""
_Q8_0_BITS = 8.5
_K_BLOCK = 256
_CONTEXT = 4096


def estimated_bytes(architecture: Architecture, file_type: str) -> int:
    """Return the approximate size of the GGUF file of a model, without what reads images.

    An 8.03 B model in Q4_K_M: 8.03e9 · 4.89 / 8 = 4.9 GB. A model whose rows are not made of whole K blocks
    of 256 weights gets larger types, about one step up.
    """
    bits = _BITS_PER_WEIGHT[file_type]
    tables = architecture.embedding_params + architecture.head.own_params
    rest = architecture.total_params - architecture.vision_params - tables
    table_bits = max(bits, _Q8_0_BITS)
    if file_type in K_QUANTS and architecture.hidden_size % _K_BLOCK:
        bits = min(bits + 1.0, _Q8_0_BITS)
    elif file_type in K_QUANTS:
        table_bits = max(bits, _BITS_PER_WEIGHT["Q6_K"])
    return int((rest * bits + tables * table_bits) / 8)


def spelled(name: str) -> str:
    """Return a type as it is spelled here, such as ``Q4_K_M`` for ``q4_k_m``; an unknown one as it is."""
    names = {kind.lower(): kind for kind in (*FILE_TYPES, *K_QUANTS, AUTO)}
    return names.get(name.lower(), name)


def next_larger(file_type: str) -> str:
    """Return the next larger type that ``auto`` tries, or F16; empty for the largest."""
    bits = _BITS_PER_WEIGHT[file_type]
    return next((kind for kind in (*LADDER, "F16") if _BITS_PER_WEIGHT[kind] > bits), "")


def rows_without_k_blocks(architecture: Architecture) -> tuple[int, ...]:
    """Return the lengths of rows that llama.cpp cannot store as K types, in ascending order."""
    text = (module.in_features for module in architecture.modules if module.part != "vision")
    return tuple(sorted({length for length in text if length % _K_BLOCK}))


def bytes_to_run(architecture: Architecture, file_type: str) -> int:
    """Return the approximate memory that llama.cpp needs at a context of 4,096 tokens.

    The file, and keys and values of every layer in float16.
    """
    cache = 2 * architecture.layers * architecture.kv_heads * architecture.head_dim * _CONTEXT * 2
    return estimated_bytes(architecture, file_type) + cache
