"""Attention over a row's samples on a CPU in bfloat16: torch's flash kernel, a backward of our own.

The kernel's backward goes through the scores in small tiles, each a matrix product too small for the
library beneath it, and takes up to three times as long as it need. Here a block of queries meets all its
keys at once, and the query heads that share a key head lie end to end in one product. What is taken from each
score goes through the same product, which adds in float32: queries have three columns more, keys three ones.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from qlora_tui.memory.attention import ATTENTION_BLOCK_ROWS, EXTRA_COLUMNS
from qlora_tui.training.padding import pad_tokens, padded_length


class RowAttention(torch.autograd.Function):
    """softmax(scale · q kᵀ) v, causal, sample by sample.

    q (1, heads, tokens, width), k and v (1, fewer heads, tokens, width); gives (1, tokens, heads, width), as
    the output projection reads it. Keeps q, k, v, the output and one number a query and head.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float
    ) -> Tensor:
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
        log_sums = query.new_empty(*query.shape[:3], dtype=torch.float32)
        parts = (torch.split(x, lengths, dim=2) for x in (query, key, value, log_sums))
        for q, k, v, log_sum, part in zip(*parts, torch.split(out, lengths, dim=1), strict=True):
            shared_k, shared_v = _expand_kv_heads(q, k, v)
            attended, sums = _flash(pad_tokens(q), pad_tokens(shared_k), pad_tokens(shared_v), scale)
            tokens = q.shape[2]
            part.copy_(attended.transpose(1, 2)[:, :tokens])
            log_sum.copy_(sums[..., :tokens])
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sums = ctx.saved_tensors
        grad = grad_outputs[0].transpose(1, 2)
        # In fp32 from the start: with products rounded to 16 bits first, what is left of a score's gradient
        # where attention looks at one token alone, which is near 0, would be rounding.
        neg_delta = grad.to(torch.float32, copy=True).mul_(out.transpose(1, 2)).sum(-1).neg_()
        extra_columns = (
            _split_precision(log_sums / -ctx.scale, query.dtype),
            _split_precision(neg_delta, query.dtype),
        )
        grads = [_empty_token_major(x) for x in (query, key, value)]
        parts = (
            torch.split(x[0], ctx.lengths, dim=1) for x in (query, key, value, grad, *extra_columns, *grads)
        )
        group = query.shape[1] // key.shape[1]
        for q, k, v, g, q_columns, grad_columns, *grads_out in zip(*parts, strict=True):
            _sample_backward(
                _augmented(q, q_columns, group),
                _augmented(k, 1.0)[:, 0],
                _augmented(v, 1.0)[:, 0],
                _augmented(g, grad_columns, group),
                ctx.scale,
                *grads_out,
            )
        return (*grads, None, None)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
    """The output and the logarithm of each query's sum, from the kernel that SDPA would choose."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)


def _expand_kv_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, copied for every query head where the kernel knows no shared ones."""
    group = q.shape[1] // k.shape[1]
    if group == 1 or _kernel_supports_gqa():
        return k, v
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


@cache
def _kernel_supports_gqa() -> bool:
    """torch 2.6's kernel takes them without a word and reads past their end."""
    q, k = torch.ones(1, 2, 3, 16), torch.ones(1, 1, 3, 16)
    out, _ = _flash(q, k, k, 1.0)
    return torch.equal(out, q)


def _empty_token_major(x: Tensor) -> Tensor:
    """For a gradient of x (1, heads, tokens, width), a token after the other, as modules gave x."""
    return x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _split_precision(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (…), fp32, as the sum of columns in ``dtype`` (…, 3): each is what rounding left of those before.

    Three of 8 bits hold all 24. With two, an attention score of 10,000 would be off by 0.15, and its weight
    by a sixth; the exponential of a larger one by orders of magnitude.
    """
    columns = []
    for _ in range(EXTRA_COLUMNS):
        columns.append(x.to(dtype))
        x = x - columns[-1]
    return torch.stack(columns, dim=-1)


def _augmented(x: Tensor, columns: Tensor | float, group: int = 1) -> Tensor:
    """x (heads, tokens, width) with columns more: (heads / group, group, tokens, width + 2), filled up."""
    heads, tokens, width = x.shape
    augmented = x.new_empty(heads, padded_length(x), width + EXTRA_COLUMNS)
    augmented[:, :tokens, :width] = x
    augmented[:, :tokens, width:] = columns
    augmented[:, tokens:] = 0
    return augmented.view(heads // group, group, *augmented.shape[1:])


def _sample_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    scale: float,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Gradients of one sample's q (heads, tokens, width), k and v, written to where they belong.

    With P = exp(scale · q kᵀ - log_sum) and D = rowsum(grad · out): toward v Pᵀ grad, toward the scores
    P · (grad vᵀ - D), toward q and k their products with k and q (Dao et al. 2022, FlashAttention, B.4).
    """
    kv_heads, group, padded_tokens, _ = q.shape
    _, tokens, width = grad_k.shape
    grad_q = grad_q.view(kv_heads, group, tokens, width)
    # Each query's scores take as much as they give. Rounded they do not quite, and what all keys share, as a
    # bias gives it to them, would be added so many times: without it nothing changes but the rounding.
    centered_k, placeholder = k[..., :width] - k[:, :tokens, :width].mean(1, keepdim=True), q.new_empty(1)
    sum_k, sum_v = (
        (torch.zeros_like(centered_k) for _ in range(2))
        if padded_tokens > ATTENTION_BLOCK_ROWS
        else (None, None)
    )
    for start in range(0, padded_tokens, ATTENTION_BLOCK_ROWS):
        end = min(start + ATTENTION_BLOCK_ROWS, padded_tokens)
        block_q, block_grad = (
            x[:, :, start:end].reshape(kv_heads, group * (end - start), -1) for x in (q, grad)
        )
        # A product times a number, added to none.
        weights = torch.baddbmm(placeholder, block_q, k[:, :end].transpose(1, 2), beta=0, alpha=scale).exp_()
        weights.view(kv_heads, group, end - start, end)[..., start:].tril_()
        block_grad_v = torch.bmm(weights.transpose(1, 2), block_grad[..., :width])
        scores = torch.bmm(block_grad, v[:, :end].transpose(1, 2)).mul_(weights)
        block_grad_q = torch.bmm(scores, centered_k[:, :end]).view(kv_heads, group, end - start, width)
        valid_tokens = min(end, tokens) - start
        torch.mul(block_grad_q[:, :, :valid_tokens], scale, out=grad_q[:, :, start : start + valid_tokens])
        block_grad_k = torch.bmm(scores.transpose(1, 2), block_q[..., :width])
        # Or they would live on beside the next block's.
        del weights, scores, block_grad_q
        if sum_k is None or sum_v is None:
            sum_k, sum_v = block_grad_k, block_grad_v
        else:
            sum_k[:, :end] += block_grad_k
            sum_v[:, :end] += block_grad_v
    assert sum_k is not None and sum_v is not None
    torch.mul(sum_k[:, :tokens], scale, out=grad_k)
    grad_v.copy_(sum_v[:, :tokens])
