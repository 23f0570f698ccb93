"""Attention over a row's samples on a CPU in half precision: torch's flash kernel, a backward of our own.

The kernel's backward goes through the scores in small tiles, each a matrix product too small for the
library beneath it, and takes up to three times as long as it need. Here a block of queries meets all its
keys at once, and the query heads that share a key head lie end to end in one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qlora_tui.memory.attention import ATTENTION_BLOCK_ROWS
from qlora_tui.training.even import filled_up


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
        parts = (torch.split(x, lengths, dim=2) for x in (query, key, value))
        log_sums = []
        for q, k, v, part in zip(*parts, torch.split(out, lengths, dim=1), strict=True):
            shared_k, shared_v = _as_taken(q, k, v)
            made, log_sum = _flash(filled_up(q), filled_up(shared_k), filled_up(shared_v), scale)
            tokens = q.shape[2]
            part.copy_(made.transpose(1, 2)[:, :tokens])
            log_sums.append(log_sum)
        ctx.save_for_backward(query, key, value, out, *log_sums)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *log_sums = ctx.saved_tensors
        made = [_as_laid_out(x) for x in (query, key, value)]
        given = (query, key, value, out.transpose(1, 2), grad_outputs[0].transpose(1, 2))
        parts = (torch.split(x[0], ctx.lengths, dim=1) for x in (*given, *made))
        for (q, k, v, o, grad, *toward), log_sum in zip(zip(*parts, strict=True), log_sums, strict=True):
            _one_backward(q, k, v, o, grad, log_sum[0], ctx.scale, toward)
        return (*made, None, None)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
    """The output and the logarithm of each query's sum, from the kernel that SDPA would choose."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)


def _as_taken(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, copied for every query head where the kernel knows no shared ones."""
    group = q.shape[1] // k.shape[1]
    if group == 1 or _takes_shared_heads():
        return k, v
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


@cache
def _takes_shared_heads() -> bool:
    """torch 2.6's kernel takes them without a word and reads past their end."""
    q, k = torch.ones(1, 2, 3, 16), torch.ones(1, 1, 3, 16)
    out, _ = _flash(q, k, k, 1.0)
    return torch.equal(out, q)


def _as_laid_out(x: Tensor) -> Tensor:
    """For a gradient of x (1, heads, tokens, width), a token after the other, as modules gave x."""
    return x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _one_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad: Tensor,
    log_sum: Tensor,
    scale: float,
    toward: Sequence[Tensor],
) -> None:
    """Gradients of one sample's q (heads, tokens, width), k and v, written to where they belong.

    With P = exp(scale · q kᵀ - log_sum) and D = rowsum(grad · out): toward v Pᵀ grad, toward the scores
    P · (grad vᵀ - D), toward q and k their products with k and q (Dao et al. 2022, FlashAttention, B.4).
    """
    real = q.shape[1]
    q, k, v, out, grad = (filled_up(x) for x in (q, k, v, out, grad))
    log_sum = log_sum[..., None]
    heads, tokens, width = q.shape
    shared, group = k.shape[0], heads // k.shape[0]
    less = (grad * out).sum(-1, keepdim=True, dtype=torch.float32)
    # The sums are subtracted in half precision; what rounding took from them comes back as a factor.
    rounded = log_sum.to(q.dtype)
    factor = (rounded - log_sum).exp_()
    grad, less = (grad * factor).to(q.dtype), (less * factor).to(q.dtype)
    sum_k, sum_v = torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, real, ATTENTION_BLOCK_ROWS):
        end = min(start + ATTENTION_BLOCK_ROWS, tokens)
        rows = group * (end - start)

        def folded(x: Tensor, start: int = start, end: int = end, rows: int = rows) -> Tensor:
            return x.view(shared, group, tokens, -1)[:, :, start:end].reshape(shared, rows, -1)

        some_q, some_grad = folded(q), folded(grad)
        seen_k, seen_v = k[:, :end], v[:, :end]
        some_rounded, some_less = (folded(x).expand(shared, rows, end) for x in (rounded, less))
        weights = torch.baddbmm(some_rounded, some_q, seen_k.transpose(1, 2), beta=-1, alpha=scale).exp_()
        weights.view(shared, group, end - start, end)[..., start:].tril_()
        sum_v[:, :end].baddbmm_(weights.transpose(1, 2), some_grad)
        scores = torch.baddbmm(some_less, some_grad, seen_v.transpose(1, 2), beta=-1).mul_(weights)
        made = torch.bmm(scores, seen_k).mul_(scale).view(shared, group, end - start, width)
        toward[0].view(shared, group, real, width)[:, :, start:end] = made[:, :, : real - start]
        sum_k[:, :end].baddbmm_(scores.transpose(1, 2), some_q, alpha=scale)
        # Or they would live on beside the next block's.
        del weights, scores
    toward[1].copy_(sum_k[:, :real])
    toward[2].copy_(sum_v[:, :real])
