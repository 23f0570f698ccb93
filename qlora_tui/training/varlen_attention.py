"""Attention over all samples of a packed sequence in one call: torch's variable-length FlashAttention.

A call per sample launches a dozen kernels for each, in every layer and pass; for short samples a GPU spends
more time on launching than on computing. Here the kernel itself reads where samples begin. Keys and values
may have fewer heads than queries, and a sliding window is part of the kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qlora_tui.memory.attention import SAMPLE_PADDING_ROWS, accumulator_width
from qlora_tui.memory.execution import BFLOAT16_CAPABILITY, flash_trains

_MAX_HEAD_WIDTH = 256
"""Widest head that the kernel supports (``check_head_dim_size_flash`` in torch's ``sdp_utils.cpp``)."""
_WIDTH_MULTIPLE = 8


@cache
def find_kernel() -> Callable[..., Any] | None:
    """torch's function; None in versions before 2.11, which have none or one without scale and window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    has = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size"} <= has.keys() else None


def has_flash(device: torch.device) -> bool:
    """Whether the GPU runs FlashAttention-2: from Ampere on."""
    return capability_of(device) >= BFLOAT16_CAPABILITY


def trains_with_flash(device: torch.device, head_width: int) -> bool:
    """Whether the GPU runs FlashAttention-2, backward included, for heads of this width."""
    return has_flash(device) and flash_trains(capability_of(device), head_width)


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


def supports(query: Tensor, value: Tensor, *, samples: int) -> bool:
    """Whether the kernel runs for queries (1, heads, tokens, width) that hold ``samples`` samples."""
    _, heads, tokens, width = query.shape
    if query.device.type != "cuda" or query.element_size() != 2 or width != value.shape[-1]:
        return False
    if width > _MAX_HEAD_WIDTH or width % _WIDTH_MULTIPLE or not trains_with_flash(query.device, width):
        return False
    # The sums of the backward are indexed with 32 bits.
    return (tokens + SAMPLE_PADDING_ROWS * samples) * heads * accumulator_width(width) < 1 << 31


def attend(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attend within each sample of a packed sequence.

    Args:
        query: (1, heads, tokens, width); ``key`` and ``value`` may have fewer heads.
        starts: (1, 1, 1, samples + 1), int32, on the CPU: where each sample begins, and the end of the last.
        window: tokens that a query attends to at most, itself included; None for all before it.

    Returns:
        (1, tokens, heads, width).
    """
    kernel = find_kernel()
    assert kernel is not None
    on_device, longest = _on_device(starts, query.device)
    windowed = window is not None and window < longest
    options = {"enable_gqa": True} if "enable_gqa" in inspect.signature(kernel).parameters else {}
    output: Tensor = kernel(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        on_device,
        on_device,
        longest,
        longest,
        scale=scale,
        window_size=(window - 1 if window is not None and windowed else -1, 0),
        **options,
    )
    return output[None]


def _on_device(starts: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """``starts`` as a vector on the device, and the longest sample: copied once for all layers and passes."""
    copied: tuple[Tensor, int] | None = getattr(starts, "copied", None)
    if copied is None or copied[0].device != device:
        places = starts.flatten()
        longest = max(end - start for start, end in pairwise(places.tolist()))
        copied = (places.to(device, non_blocking=True), longest)
        setattr(starts, "copied", copied)  # noqa: B010  # a tensor has no such field
    return copied
