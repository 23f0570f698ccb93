"""Writes the weights of a GGUF file as one bfloat16 safetensors file, a block of rows at a time.

Memory holds one float32 block of at most ``BLOCK_BYTES``, never the whole model. Changes that llama.cpp's
converter (``convert_hf_to_gguf.py``) makes to the values are undone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.catalog.gguf import name_of

BLOCK_BYTES = 16 * 2**20
"""Largest block of rows that is dequantized at once, in bytes of float32."""
ProgressCallback = Callable[[int, int], None]
"""Called with the bytes written and the total bytes of the safetensors file."""
Shape = tuple[int, ...]

_NORMS_PLUS_ONE = ("gemma2", "gemma3")
"""Architectures whose norms multiply by 1 + w in transformers, but by w in llama.cpp."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the safetensors file."""

    name: str
    shape: Shape
    tensor: Any
    """``gguf.ReaderTensor``: a view of the mapped GGUF file."""
    change: Callable[[Any], Any] | None = None
    """Applied to the whole tensor in float32, which is then not split into blocks."""

    @property
    def size(self) -> int:
        """Size in the safetensors file, in bytes."""
        count = 2
        for length in self.shape:
            count *= length
        return count


def weights_of(reader: Any, architecture: str, heads: int, kv_heads: int) -> list[GgufTensor]:
    """All tensors of a ``gguf.GGUFReader`` in the order of the file. Raises ValueError for an unknown one."""
    weights = []
    for tensor in reader.tensors:
        name = name_of(tensor.name, architecture)
        if name is None:
            raise ValueError(f"its tensor {tensor.name} is unknown")
        # ggml lists dimensions from the fastest-changing one.
        shape = tuple(int(length) for length in reversed(tensor.shape))
        weights.append(GgufTensor(name, shape, tensor, _change(name, architecture, heads, kv_heads)))
    return weights


def _change(name: str, architecture: str, heads: int, kv_heads: int) -> Callable[[Any], Any] | None:
    if architecture in _NORMS_PLUS_ONE and name.endswith("norm.weight"):
        return lambda values: values - 1
    if architecture == "llama" and ".q_proj." in name:
        return lambda values: _unpermute_rope(values, heads)
    if architecture == "llama" and ".k_proj." in name:
        return lambda values: _unpermute_rope(values, kv_heads)
    return None


def _unpermute_rope(values: Any, heads: int) -> Any:
    """Undo llama.cpp's order of the rows of q and k, (rows, columns).

    Its rotary embedding rotates pairs of neighboring rows of a head, (0, 1), (2, 3), …; that of transformers
    pairs a row with the one half a head further, (0, d/2), (1, d/2 + 1), … With d = 4, rows ``0 2 1 3`` of a
    head become ``0 1 2 3``.
    """
    rows = values.shape[0]
    pairs = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def write_weights(weights: list[GgufTensor], path: Path, progress: ProgressCallback) -> None:
    """Write ``weights`` to ``path`` in the safetensors format. Raises OSError.

    Format: an unsigned 64-bit length, a JSON header of that length, the tensors one after another
    (github.com/huggingface/safetensors, README, "Format").
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for weight in weights:
        header[weight.name] = {
            "dtype": "BF16",
            "shape": list(weight.shape),
            "data_offsets": [total, total + weight.size],
        }
        total += weight.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    progress(done, total)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            for block in _blocks(weight):
                done += out.write(_bfloat16(block))
                progress(done, total)


def _blocks(weight: GgufTensor) -> Iterator[Any]:
    """Yield the tensor in float32, a block of rows at a time."""
    from gguf import dequantize

    tensor = weight.tensor
    if weight.change is not None or len(weight.shape) < 2:
        values = dequantize(tensor.data, tensor.tensor_type)
        yield weight.change(values) if weight.change else values
        return
    rows = max(1, BLOCK_BYTES // (4 * weight.shape[-1]))
    for start in range(0, weight.shape[0], rows):
        yield dequantize(tensor.data[start : start + rows], tensor.tensor_type)


def _bfloat16(values: Any) -> Any:
    """Round float32 to the nearest bfloat16, ties to even, as bits in uint16. NaN stays NaN."""
    import numpy as np

    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + (odd + np.uint32(0x7FFF))) >> np.uint32(16)
    halves = rounded.astype(np.uint16)
    halves[np.isnan(values)] = 0x7FC0
    return halves
