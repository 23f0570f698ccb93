"""Numbers of tokens for which a CPU has its kernels already: what is multiplied is filled up to them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qlora_tui.memory.onednn_cache import TOKEN_MULTIPLE


def token_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """Tokens of which rows and samples should be a multiple: bfloat16 on a CPU is multiplied by oneDNN."""
    return TOKEN_MULTIPLE if device.type == "cpu" and dtype == torch.bfloat16 else 1


def pad_tokens(x: Tensor) -> Tensor:
    """x (…, tokens, width) with zeros behind the last token, up to such a multiple."""
    more = padded_length(x) - x.shape[-2]
    return functional.pad(x, (0, 0, 0, more)) if more else x


def padded_length(x: Tensor) -> int:
    """Tokens of x (…, tokens, width) when it is filled up."""
    multiple = token_multiple(x.device, x.dtype)
    return -(-x.shape[-2] // multiple) * multiple
