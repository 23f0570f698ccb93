"""Several samples in one sequence, each attending only to itself.

The samples of a micro-batch lie end to end in one sequence, at batch size one. transformers' SDPA code
isolates them with one dense mask over the whole sequence. The attention here computes each sample separately,
so work and memory grow with the square of a sample's length, not of the sequence's. There are two
implementations:

* ``varlen``: one call of FlashAttention for the sequence (:func:`attend`), on a GPU in 16 bits.
* ``segments``: SDPA sample by sample, if ``varlen`` does not run. On a CPU in bfloat16,
  :class:`.fused.cpu_attention.RowAttention` can replace SDPA.

``compute_device.choose_attention`` decides which implementation to try, and ``model.prepare_base`` uses it
only if it passes a check on the loaded model.

The beginnings of samples are passed as the attention mask: a four-dimensional int32 tensor, which
transformers passes on unchanged (``masking_utils._preprocess_mask_arguments``), and which stays on the CPU so
that reading it does not wait for the GPU. The tensor holds FlashAttention's ``cu_seqlens``. For samples of 3,
1 and 2 tokens::

    mask       [[[[0 3 4 6]]]]         (1, 1, 1, samples + 1)
    query      (1, heads, 6, width)    split into (1, heads, 3 | 1 | 2, width)
    allowed    1 . . . . .             what the three causal calls compute, as the mask over the
               1 1 . . . .             whole sequence that is never created
               1 1 1 . . .
               . . . 1 . .
               . . . . 1 .
               . . . . 1 1

A call per sample launches a dozen kernels for each, in every layer and pass; for short samples a GPU spends
more time on launching than on computing. With ``varlen`` the kernel itself reads where samples begin. Keys
and values may have fewer heads than queries, and a sliding window is part of the kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from qlora_tui.memory.execution import (
    BFLOAT16_CAPABILITY,
    SAMPLE_PADDING_ROWS,
    accumulator_width,
    flash_trains,
)
from qlora_tui.training.fused.cpu_attention import RowAttention, pad_tokens, token_multiple

_MAX_HEAD_WIDTH = 256
"""Maximum head size that the kernel supports (``check_head_dim_size_flash`` in torch's ``sdp_utils.cpp``)."""
_WIDTH_MULTIPLE = 8


@cache
def find_kernel() -> Callable[..., Any] | None:
    """Return torch's varlen function. None before torch 2.11: earlier releases lack the function, or its
    scale and window arguments.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    has = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size"} <= has.keys() else None


def has_flash(device: torch.device) -> bool:
    """Return whether the GPU runs FlashAttention-2, which requires Ampere or newer."""
    return capability_of(device) >= BFLOAT16_CAPABILITY


def trains_with_flash(device: torch.device, head_width: int) -> bool:
    """Return whether the GPU runs FlashAttention-2, backward included, for heads of this width."""
    return has_flash(device) and flash_trains(capability_of(device), head_width)


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


def supports(query: Tensor, value: Tensor, *, samples: int) -> bool:
    """Return whether the kernel supports queries (1, heads, tokens, width) with ``samples`` samples."""
    _, heads, tokens, width = query.shape
    if query.device.type != "cuda" or query.element_size() != 2 or width != value.shape[-1]:
        return False
    if width > _MAX_HEAD_WIDTH or width % _WIDTH_MULTIPLE or not trains_with_flash(query.device, width):
        return False
    # The accumulators of the backward are indexed with 32 bits.
    return (tokens + SAMPLE_PADDING_ROWS * samples) * heads * accumulator_width(width) < 1 << 31


def attend(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attend within each sample of a packed sequence.

    Args:
        query: (1, heads, tokens, width); ``key`` and ``value`` may have fewer heads.
        starts: (1, 1, 1, samples + 1), int32, on the CPU: where each sample begins, and the end of the last.
        window: maximum number of tokens that a query attends to, itself included; None for all earlier
            tokens.

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
    """Return ``starts`` as a vector on the device, and the longest sample's length.

    Both are computed once for all layers and passes, and kept with ``starts``.
    """
    copied: tuple[Tensor, int] | None = getattr(starts, "copied", None)
    if copied is None or copied[0].device != device:
        places = starts.flatten()
        longest = max(end - start for start, end in pairwise(places.tolist()))
        copied = (places.to(device, non_blocking=True), longest)
        setattr(starts, "copied", copied)  # noqa: B010  # a tensor has no such field
    return copied


PackedAttention: TypeAlias = Literal["varlen", "segments"]
NAMES: dict[PackedAttention, str] = {"varlen": "qlora_varlen", "segments": "qlora_segments"}
"""Name of each implementation in transformers."""


AttentionFunction: TypeAlias = Callable[..., tuple[Tensor, None]]
"""Signature that transformers expects: (batch, heads, tokens, width) to (batch, tokens, heads, width)."""


def register() -> None:
    """Register the implementations with transformers; calling this again has no effect."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for kind, function in _functions().items():
        AttentionInterface.register(NAMES[kind], function)
        # Used for calls without packed samples, such as generating a sample.
        AttentionMaskInterface.register(NAMES[kind], sdpa_mask)


def packed_attention_of(model: Any) -> AttentionFunction | None:
    """Return the function of the implementation that a model uses; None if it is the library's."""
    name = model.config._attn_implementation
    return next((function for kind, function in _functions().items() if NAMES[kind] == name), None)


def segment_mask(lengths: list[int]) -> Tensor:
    """Return the attention mask that holds ``cu_seqlens``, (1, 1, 1, samples + 1), int32.

    For example, the lengths [3, 1] give 0, 3, 4.
    """
    starts = torch.zeros(1, 1, 1, len(lengths) + 1, dtype=torch.int32)
    starts[0, 0, 0, 1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    return starts


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each sample, one sample at a time, as an attention function of transformers.

    If the mask is not that of packed samples, attention is computed as in the library. Maps (batch, heads,
    tokens, width) to (batch, tokens, heads, width).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain = softcap is None and s_aux is None
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        starts = attention_mask.flatten().tolist()
        lengths = [end - start for start, end in pairwise(starts)]
        windowed = sliding_window is not None and max(lengths) > sliding_window
        if (
            plain
            and not (dropout or windowed)
            and prefers_row_attention(query)
            and query.shape[-1] == value.shape[-1]
        ):
            attended: Tensor = RowAttention.apply(query, key, value, lengths, scale)  # type: ignore[no-untyped-call]
            return attended, None
        # torch.split instead of slices: its backward is one cat, while the backward of each slice fills
        # zeros.
        parts = [
            _sample_attention(q, k, v, dropout, scale, sliding_window, softcap, s_aux).transpose(1, 2)
            for q, k, v in zip(
                *(torch.split(x, lengths, dim=2) for x in (query, key, value)),
                strict=True,
            )
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), None
    if plain:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    if attention_mask is None:
        attention_mask = _causal(query.shape[2], key.shape[2], None, query.device)
    output = _eager_attention(query, key, value, attention_mask, dropout, scale, softcap, s_aux)
    return output.transpose(1, 2).contiguous(), None


def varlen_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attend in one FlashAttention call for the whole sequence if it is supported, else sample by sample.

    Takes the same settings as :func:`segment_attention`.
    """
    if (
        attention_mask is not None
        and attention_mask.dtype == torch.int32
        # The kernel does not support capped scores (Gemma 2) or sinks that compete with them (gpt-oss)
        # either.
        and not settings.get("dropout")
        and settings.get("softcap") is None
        and settings.get("s_aux") is None
        and supports(query, value, samples=attention_mask.shape[-1] - 1)
    ):
        scaling, window = settings.get("scaling"), settings.get("sliding_window")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(query, key, value, attention_mask, scale, window), None
    return segment_attention(module, query, key, value, attention_mask, **settings)


def _functions() -> dict[PackedAttention, AttentionFunction]:
    return {"varlen": varlen_attention_forward, "segments": segment_attention}


def prefers_row_attention(query: Tensor) -> bool:
    """Return whether :class:`.fused.cpu_attention.RowAttention` is faster: on a CPU in bfloat16.

    In float32 torch's backward is faster. In float16 the augmented columns of ``RowAttention`` may overflow.
    """
    return query.device.type == "cpu" and query.dtype == torch.bfloat16


def _sample_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    tokens = query.shape[2]
    if torch.is_grad_enabled() and tokens % token_multiple(query.device, query.dtype):
        # Padding comes after all real tokens, which attend only to earlier ones. The reference pass of a
        # preference method requires no gradient, but is padded like the step, so that both round alike.
        query, key, value = (pad_tokens(x) for x in (query, key, value))
        return _sample_attention(query, key, value, dropout, scale, sliding_window, softcap, sinks)[
            :, :, :tokens
        ]
    windowed = sliding_window is not None and tokens > sliding_window
    if softcap is not None or sinks is not None:
        mask = _causal(tokens, tokens, sliding_window if windowed else None, query.device)
        return _eager_attention(query, key, value, mask, dropout, scale, softcap, sinks)
    grouped = query.shape[1] != key.shape[1]
    if grouped and not (value.shape[-1] == query.shape[-1] and supports_grouped_heads(query, windowed)):
        key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
        grouped = False
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_causal(tokens, tokens, sliding_window, query.device) if windowed else None,
        dropout_p=dropout,
        is_causal=not windowed,
        scale=scale,
        enable_gqa=grouped,
    )


def supports_grouped_heads(query: Tensor, masked: bool) -> bool:
    """Return whether SDPA has a fused kernel for keys and values with fewer heads than queries.

    On a GPU only FlashAttention has one. It needs 16 bits, an Ampere GPU or newer, and no mask, and does not
    support every head width.
    Otherwise torch would store all scores.
    """
    if query.device.type != "cuda":
        return True
    if masked or query.element_size() != 2:
        return False
    return trains_with_flash(query.device, query.shape[-1])


def _eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    dropout: float,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention with soft-capped scores (Gemma 2) or sinks (gpt-oss), without a fused kernel."""
    key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return functional.dropout(weights, dropout, training=dropout > 0) @ value


def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return a mask, True if a query attends to a key.

    A query attends to itself and to earlier tokens: with ``window``, to at most that many, itself included.
    """
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    allowed = key <= query
    if window is not None:
        allowed &= key > query - window
    return allowed


def _repeat(heads: Tensor, wanted: int) -> Tensor:
    return heads.repeat_interleave(wanted // heads.shape[1], dim=1) if heads.shape[1] != wanted else heads


def use_packed_attention(model: Any, kind: PackedAttention = "segments") -> bool:
    """Switch to packed attention; False if the family does not use transformers' attention interface."""
    register()
    return set_attention(model, NAMES[kind])


def set_attention(model: Any, name: str) -> bool:
    """Switch to an attention implementation by name; False if the family does not support switching."""
    before = model.config._attn_implementation
    with suppress(ValueError, AttributeError, NotImplementedError):
        model.set_attn_implementation(name)
    if model.config._attn_implementation == name:
        return True
    model.set_attn_implementation(before)
    return False
