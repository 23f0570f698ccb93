"""The file types of GGUF exports: the bits per weight, the KL divergence that rounding can explain, and the
program that writes a file of the type.

:data:`FILE_TYPES` is the only list of these types. The export, its check against llama.cpp, the command line
and the export dialog read it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import EXIT_USAGE, UserError

K_BLOCK = 256
"""Number of weights in a block of a K type (ggml, ``QK_K``). The rows of a matrix must consist of whole
blocks.
"""


@dataclass(frozen=True)
class FileType:
    """A file type of GGUF exports."""

    name: str
    number: int
    """Value of ``general.file_type`` (llama.cpp, ``llama_ftype``)."""
    bits_per_weight: float
    """Average number of bits per weight. The values of K types were measured on Llama 3.1 8B (llama.cpp,
    tools/quantize/README.md); those of other types are calculated from their blocks.
    """
    block: int
    """Number of weights that are encoded together. The length of a matrix's rows must be a multiple of it."""
    kl_limit: float
    """Largest mean KL divergence from the trained model, in nats, that rounding to this type can explain."""
    kl_floor: float = 0.015
    """KL divergence, in nats, that rounding alone may cause. A smaller effect of an adapter cannot be
    detected. The largest observed value for BF16 is 0.011: SmolLM2-135M from a 4-bit file, with an adapter
    trained for five steps.
    """

    @property
    def needs_llama_cpp(self) -> bool:
        """Whether only llama.cpp writes this type. The ``gguf`` package writes the others."""
        return self.block == K_BLOCK

    @property
    def is_nearly_exact(self) -> bool:
        """Whether the type rounds too little to hide an error of the conversion."""
        return self.bits_per_weight >= 8


FILE_TYPES = {
    each.name: each
    for each in (
        # name, number, bits per weight, block, limit and floor of the KL divergence
        FileType("BF16", 32, 16.0, 1, 0.02, 0.02),
        FileType("F16", 1, 16.0, 1, 0.02, 0.004),
        FileType("Q8_0", 7, 8.5, 32, 0.05, 0.03),
        FileType("Q6_K", 18, 6.56, K_BLOCK, 0.1),
        FileType("Q5_1", 9, 6.0, 32, 0.5),
        FileType("Q5_K_M", 17, 5.7, K_BLOCK, 0.5),
        FileType("Q5_K_S", 16, 5.57, K_BLOCK, 0.5),
        FileType("Q5_0", 8, 5.5, 32, 0.5),
        FileType("Q4_1", 3, 5.0, 32, 1.0),
        FileType("Q4_K_M", 15, 4.89, K_BLOCK, 1.0),
        FileType("Q4_K_S", 14, 4.67, K_BLOCK, 1.0),
        FileType("Q4_0", 2, 4.5, 32, 1.0),
        FileType("Q3_K_L", 13, 4.3, K_BLOCK, 2.0),
        FileType("Q3_K_M", 12, 4.0, K_BLOCK, 2.0),
        FileType("Q3_K_S", 11, 3.64, K_BLOCK, 2.0),
        FileType("Q2_K", 10, 3.16, K_BLOCK, 2.0),
    )
}
"""The file types by name, the largest first."""
DEFAULT_TYPE = "Q8_0"
AUTO = "auto"
"""Selects the smallest file type whose answers are close enough to the adapter's."""
LADDER = ("Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
"""File types that ``auto`` tries, the smallest first."""
OFFERED = (DEFAULT_TYPE, "F16", AUTO, "Q4_K_M", "Q5_K_M", "Q6_K")
"""File types that the export dialog offers, in this order."""
_CONTEXT = 4096


def find_file_type(name: str) -> FileType:
    """Return the file type of this name. Raises UserError, exit code 2, if it is unknown."""
    if name not in FILE_TYPES:
        raise UserError(
            "Unknown file type",
            what=f"{name} is not a type that can be written.",
            fix=f"Choose from {', '.join(FILE_TYPES)}, or use {AUTO} alone.",
            exit_code=EXIT_USAGE,
        )
    return FILE_TYPES[name]


def needs_llama_cpp(name: str) -> bool:
    """Return whether a file type, or ``auto``, needs llama.cpp. Raises UserError if it is unknown."""
    return name == AUTO or find_file_type(name).needs_llama_cpp


def types_without_llama_cpp() -> list[str]:
    """Return the names of the file types that can be written without llama.cpp, the largest first."""
    return [name for name, each in FILE_TYPES.items() if not each.needs_llama_cpp]


def spelled(name: str) -> str:
    """Return a type in our spelling, such as ``Q4_K_M`` for ``q4_k_m``; unknown types stay unchanged."""
    names = {kind.lower(): kind for kind in (*FILE_TYPES, AUTO)}
    return names.get(name.lower(), name)


def next_larger(name: str) -> str:
    """Return the next larger type that ``auto`` tries, or F16; empty for the largest type."""
    bits = find_file_type(name).bits_per_weight
    return next((kind for kind in (*LADDER, "F16") if FILE_TYPES[kind].bits_per_weight > bits), "")


def estimated_bytes(architecture: Architecture, name: str) -> int:
    """Return the approximate size of a model's GGUF file in bytes, without the vision part.

    An 8.03 B model in Q4_K_M: 8.03e9 · 4.89 / 8 = 4.9 GB. A model whose rows are not made of whole K blocks
    of 256 weights gets larger types, about one step up.
    """
    kind, wide = find_file_type(name), FILE_TYPES["Q8_0"]
    bits = kind.bits_per_weight
    tables = architecture.embedding_params + architecture.head.own_params
    rest = architecture.total_params - architecture.vision_params - tables
    table_bits = max(bits, wide.bits_per_weight)
    if kind.needs_llama_cpp and architecture.hidden_size % K_BLOCK:
        bits = min(bits + 1.0, wide.bits_per_weight)
    elif kind.needs_llama_cpp:
        table_bits = max(bits, FILE_TYPES["Q6_K"].bits_per_weight)
    return int((rest * bits + tables * table_bits) / 8)


def size_from_parameters(parameters: int, name: str) -> int:
    """Return the approximate size of a GGUF file in bytes if only the model's number of parameters is known.

    The embedding and the output head are counted like all other weights, although K types store them in more
    bits: :func:`estimated_bytes` is closer.
    """
    return int(parameters * find_file_type(name).bits_per_weight / 8)


def rows_without_k_blocks(architecture: Architecture) -> tuple[int, ...]:
    """Return the row lengths that llama.cpp cannot store as K types, in ascending order."""
    text = (module.in_features for module in architecture.modules if module.part != "vision")
    return tuple(sorted({length for length in text if length % K_BLOCK}))


def bytes_to_run(architecture: Architecture, name: str) -> int:
    """Return the approximate memory that llama.cpp needs at a context of 4,096 tokens, in bytes.

    The memory holds the file, and keys and values of every layer in float16.
    """
    cache = 2 * architecture.layers * architecture.kv_heads * architecture.head_dim * _CONTEXT * 2
    return estimated_bytes(architecture, name) + cache
