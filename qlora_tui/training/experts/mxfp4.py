"""Experts as gpt-oss stores them: MXFP4, blocks of 32 four-bit floats that share a power of two.

The format is that of the Open Compute Project's "Microscaling Formats (MX)" specification 1.0, section 5.3.
A projection has two tensors: ``_blocks`` (experts, outputs, blocks, 16), uint8 with two values a byte, the
first in the low four bits, and ``_scales`` (experts, outputs, blocks), uint8 exponents with a bias of 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"
"""Suffixes of the two tensors of a projection."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of E2M1 by their low three bits; the fourth is the sign."""
_EXPONENT_BIAS = 127


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights (outputs, inputs) of one expert.

    Example: blocks (5760, 90, 16) and scales (5760, 90) give a matrix (5760, 2880).

    Args:
        blocks: (outputs, blocks, 16), uint8, or another type that holds the same integers.
        scales: (outputs, blocks), likewise.
    """
    values = torch.tensor((*_MAGNITUDES, *(-each for each in _MAGNITUDES)), dtype=dtype, device=blocks.device)
    packed = blocks.to(torch.uint8)
    halves = torch.stack((packed & 0x0F, packed >> 4), dim=-1)  # (outputs, blocks, 16, 2)
    matrix = values[halves.int()].flatten(2)  # (outputs, blocks, 32)
    torch.ldexp(matrix, (scales.int() - _EXPONENT_BIAS)[..., None], out=matrix)
    return matrix.flatten(1)
