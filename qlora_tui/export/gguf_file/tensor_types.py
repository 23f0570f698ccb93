"""Types of a GGUF file's tensors, and their encoding with the ``gguf`` package.

Norms, biases, rotary factors and routers stay float32, as llama.cpp expects. In a file of a 4- or 5-bit type
the embedding and the head are Q8_0: they are the weights that suffer most from few bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qlora_tui.catalog.gguf import FileType
from qlora_tui.errors import UserError

_ROUTER = ".ffn_gate_inp"
_WIDE_AT_FEW_BITS = ("token_embd.weight", "output.weight")


def tensor_type(name: str, shape: tuple[int, ...], file_type: FileType) -> Any:
    """Return the ``GGMLQuantizationType`` of a tensor in a file of a type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2 or name.startswith("rope_") or _ROUTER in name:
        return GGMLQuantizationType.F32
    if name in _WIDE_AT_FEW_BITS and file_type.startswith(("Q4", "Q5")):
        file_type = "Q8_0"
    kind = GGMLQuantizationType[file_type]
    block, _ = GGML_QUANT_SIZES[kind]
    # A row that is not made of whole blocks cannot be quantized.
    return kind if shape[-1] % block == 0 else GGMLQuantizationType.F16


def encoded_bytes(shape: tuple[int, ...], kind: Any) -> int:
    """Return the size of a tensor in the file."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // int(block) * int(size)


def encode(values: Tensor, kind: Any) -> bytes:
    """Encode a tensor, or a block of its rows. Raises UserError for a weight beyond float16's range."""
    from gguf import GGMLQuantizationType, quantize

    if kind == GGMLQuantizationType.BF16:
        return bytes(values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().data)
    if kind == GGMLQuantizationType.F16:
        halves = values.to(torch.float16)
        if not bool(torch.isfinite(halves).all()):
            raise UserError(
                "A weight is too large for float16",
                what="F16 stores values up to 65,504, and a weight is larger, or is not a number.",
                fix="Export as BF16 or Q8_0.",
            )
        return bytes(halves.contiguous().view(torch.uint8).numpy().data)
    wide = values.float().contiguous().numpy()
    return bytes(wide.data if kind == GGMLQuantizationType.F32 else quantize(wide, kind).data)
