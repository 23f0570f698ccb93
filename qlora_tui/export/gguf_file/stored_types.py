"""The types of the matrices in a written GGUF file, and why some are larger than the file's type."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from msgspec import Struct

from qlora_tui.catalog.gguf import K_QUANTS, read_gguf

_NOT_BLOCKS_OF_256 = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "F16", "BF16")
"""Types that llama.cpp writes in place of a K type (src/llama-quant.cpp, ``tensor_type_fallback``)."""
_K_BLOCK, _BLOCK = 256, 32


class StoredTypes(Struct, frozen=True):
    """Types of a file's matrices."""

    counts: dict[str, int]
    """Number of matrices by type, the most frequent first."""
    replaced: tuple[str, ...] = ()
    """Types that stand in for smaller ones whose blocks do not fit the rows."""
    replaced_count: int = 0
    row_lengths: tuple[int, ...] = ()
    """Lengths of the rows that do not fit."""
    block: int = _K_BLOCK
    """Number of weights in a block of the file's type."""

    @property
    def sentence(self) -> str:
        """Say why the file is larger than its type suggests; empty where it is not."""
        if not self.replaced:
            return ""
        lengths = " and ".join(f"{length:,}" for length in self.row_lengths)
        count = f"{self.replaced_count} of {sum(self.counts.values())} matrices"
        return (
            f"{count} are {' and '.join(self.replaced)}, "
            f"which makes the file larger: rows of {lengths} are not made of whole blocks of {self.block}"
        )


def stored_types(path: Path, file_type: str) -> StoredTypes:
    """Read the types of a written file of a type. Raises UserError for a file that is not GGUF."""
    from gguf import GGMLQuantizationType

    header = read_gguf(path)
    matrices = {
        name: GGMLQuantizationType(kind).name
        for name, kind in header.tensor_types.items()
        if len(header.tensors[name]) > 1
    }
    block = _K_BLOCK if file_type in K_QUANTS else _BLOCK
    instead = _NOT_BLOCKS_OF_256 if file_type in K_QUANTS else ("F16",)
    replaced = [
        name
        for name, kind in matrices.items()
        if kind in instead and header.tensors[name][0] % block and file_type not in ("F16", "BF16")
    ]
    return StoredTypes(
        counts=dict(Counter(matrices.values()).most_common()),
        replaced=tuple(kind for kind, _ in Counter(matrices[name] for name in replaced).most_common()),
        replaced_count=len(replaced),
        row_lengths=tuple(sorted({header.tensors[name][0] for name in replaced})),
        block=block,
    )
