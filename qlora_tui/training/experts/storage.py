"""The matrices of one projection of all experts of a layer, each quantized to 4 bits separately.

Every expert is quantized as bitsandbytes quantizes a linear layer: 64 weights form a block and share a scale;
with double quantization, 256 scales form a block and share a second scale. The parts of all experts are
stacked in plain tensors with one row per expert, so that a single expert can be written, read and moved.

Qwen3-30B-A3B's ``gate_up_proj``, 128 experts of (1536, 2048)::

    gate_up_proj                (128, 1572864)  uint8, two weights a byte
    gate_up_proj_absmax         (128, 49152)    uint8 with double quantization, else float32
    gate_up_proj_nested_absmax  (128, 192)      float32, only with double quantization
    gate_up_proj_offset         (128,)          float32, only with double quantization

gpt-oss stores its experts as MXFP4, blocks of 32 four-bit floats that share a power of two. The format is
that of the Open Compute Project's "Microscaling Formats (MX)" specification 1.0, section 5.3. A projection
has two tensors: ``_blocks`` (experts, outputs, blocks, 16), uint8 with two values a byte, the first in the
low four bits, and ``_scales`` (experts, outputs, blocks), uint8 exponents with a bias of 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qlora_tui.memory.weights import BLOCK, NESTED_BLOCK
from qlora_tui.recipe.schema import Quantization

PACKED = ""
ABSMAX, NESTED_ABSMAX, OFFSET = "_absmax", "_nested_absmax", "_offset"
"""Suffixes of the names of the tensors. The packed weights have the name of the parameter they replace."""


@dataclass(frozen=True)
class ExpertLayout:
    """Shape and quantization of one projection of the experts of a layer."""

    experts: int
    rows: int
    columns: int
    """Columns of a matrix, which is stored as (outputs, inputs), or in gpt-oss as (inputs, outputs)."""
    method: str
    """``nf4`` or ``fp4``."""
    nested: bool
    """Whether scales are quantized too (double quantization)."""

    @property
    def numel(self) -> int:
        """Number of weights of one expert."""
        return self.rows * self.columns

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the names of the tensors."""
        return (PACKED, ABSMAX, NESTED_ABSMAX, OFFSET) if self.nested else (PACKED, ABSMAX)

    def empty_tensors(self, device: torch.device | str) -> dict[str, Tensor]:
        """Return uninitialized tensors for all experts, keyed by suffix."""
        blocks = -(-self.numel // BLOCK)
        tensors = {
            PACKED: torch.empty(self.experts, -(-self.numel // 2), dtype=torch.uint8, device=device),
            ABSMAX: torch.empty(
                self.experts, blocks, dtype=torch.uint8 if self.nested else torch.float32, device=device
            ),
        }
        if self.nested:
            tensors[NESTED_ABSMAX] = torch.empty(
                self.experts, -(-blocks // NESTED_BLOCK), dtype=torch.float32, device=device
            )
            tensors[OFFSET] = torch.empty(self.experts, dtype=torch.float32, device=device)
        return tensors


def quantize_into(tensors: Mapping[str, Tensor], expert: int, matrix: Tensor, layout: ExpertLayout) -> None:
    """Quantize the matrix of one expert, (rows, columns), into its row of ``tensors``."""
    from bitsandbytes.functional import quantize_4bit

    if matrix.shape != (layout.rows, layout.columns):
        raise ValueError(f"an expert of {tuple(matrix.shape)}, and not of {(layout.rows, layout.columns)}")
    packed, state = quantize_4bit(
        matrix.contiguous(), blocksize=BLOCK, compress_statistics=layout.nested, quant_type=layout.method
    )
    tensors[PACKED][expert] = packed.view(-1)
    tensors[ABSMAX][expert] = state.absmax
    if layout.nested:
        tensors[NESTED_ABSMAX][expert] = state.state2.absmax
        tensors[OFFSET][expert] = state.offset


def dequantize(
    tensors: Mapping[str, Tensor],
    expert: int,
    layout: ExpertLayout,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Return the matrix of one expert, (rows, columns), in ``dtype``.

    Args:
        tensors: in the form of :meth:`ExpertLayout.empty_tensors`.
        out: buffer of at least as many elements, which bitsandbytes writes to if it can.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed = tensors[PACKED]
    shape = torch.Size((layout.rows, layout.columns))
    # bitsandbytes writes into a given buffer on a GPU only; on meta there is nothing to write.
    target = None if out is None or packed.device.type == "cpu" else out[: layout.numel].view(shape)
    if target is not None and packed.device.type == "meta":
        return target
    nested = offset = None
    if layout.nested:
        nested = QuantState(
            absmax=tensors[NESTED_ABSMAX][expert],
            code=_scale_code(packed.device),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        offset = tensors[OFFSET][expert]
    state = QuantState(
        absmax=tensors[ABSMAX][expert],
        shape=shape,
        blocksize=BLOCK,
        quant_type=layout.method,
        dtype=dtype,
        offset=offset,
        state2=nested,
    )
    matrix: Tensor = dequantize_4bit(packed[expert].view(-1, 1), state, out=target)
    return matrix


@lru_cache(maxsize=8)
def _scale_code(device: torch.device) -> Tensor:
    """Return the 256 values that quantized scales can have, which are the same in every module."""
    from bitsandbytes.functional import create_dynamic_map

    return torch.as_tensor(create_dynamic_map()).to(device)


BLOCKS, SCALES = "_blocks", "_scales"
"""Suffixes of the names of a projection's two tensors in MXFP4."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of E2M1, indexed by the low three bits; the fourth bit is the sign."""
_EXPONENT_BIAS = 127


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights (outputs, inputs) of one expert.

    Example: blocks (5760, 90, 16) and scales (5760, 90) give a matrix (5760, 2880).

    Args:
        blocks: (outputs, blocks, 16), uint8, or another type that holds the same integers.
        scales: (outputs, blocks), of one of these types.
    """
    values = torch.tensor((*_MAGNITUDES, *(-each for each in _MAGNITUDES)), dtype=dtype, device=blocks.device)
    packed = blocks.to(torch.uint8)
    halves = torch.stack((packed & 0x0F, packed >> 4), dim=-1)  # (outputs, blocks, 16, 2)
    matrix = values[halves.int()].flatten(2)  # (outputs, blocks, 32)
    torch.ldexp(matrix, (scales.int() - _EXPONENT_BIAS)[..., None], out=matrix)
    return matrix.flatten(1)


def round_to_4_bits(weight: Tensor, settings: Quantization) -> Tensor:
    """Return a weight rounded as by quantization to 4 bits, in its original shape and dtype."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.contiguous(),
        quant_type=settings.method,
        compress_statistics=settings.double_quantization,
    )
    rounded: Tensor = functional.dequantize_4bit(packed, state)
    return rounded.view(weight.shape).to(weight.dtype)
