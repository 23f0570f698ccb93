"""Pads tokens to a multiple, so that a CPU reuses its matrix kernels instead of creating one per length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qlora_tui.memory.levels import TOKEN_MULTIPLE


def token_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """The multiple of tokens: more than 1 only for bfloat16 on a CPU, whose products oneDNN computes."""
    return TOKEN_MULTIPLE if device.type == "cpu" and dtype == torch.bfloat16 else 1


def pad_tokens(x: Tensor) -> Tensor:
    """Append zeros to x (…, tokens, width), up to a multiple of tokens."""
    more = padded_length(x) - x.shape[-2]
    return functional.pad(x, (0, 0, 0, more)) if more else x


def padded_length(x: Tensor) -> int:
    """Tokens of x (…, tokens, width) after padding."""
    multiple = token_multiple(x.device, x.dtype)
    return -(-x.shape[-2] // multiple) * multiple
