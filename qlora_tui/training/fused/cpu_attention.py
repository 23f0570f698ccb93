"""Attention over packed samples on a CPU in bfloat16: torch's flash kernel with a custom backward.

The kernel's backward computes scores in small tiles, each a matrix product too small for oneDNN, and takes up
to three times as long as necessary. Here a block of queries is multiplied by all its keys in one product, and
the query heads that share a key head are stacked in the same product.

**Augmented columns.** The backward needs ``scale · q kᵀ - log_sum`` and ``grad vᵀ - delta``, with one
``log_sum`` and one ``delta`` per query. A bfloat16 product would already be rounded before they could be
subtracted. So they are part of the product, which is summed in float32 and then rounded::

    [q | c₁ c₂ c₃] · [k | 1 1 1]ᵀ = q kᵀ + c₁ + c₂ + c₃,    c₁ + c₂ + c₃ = -log_sum / scale

Three bfloat16 columns are needed because one has 8 bits and a float32 has 24.

**Shapes.** One sample of 40 tokens, 9 query heads, 3 key heads of width 64; tokens are padded to 64, a
multiple of 32, so that oneDNN generates few different kernels::

    q             (9, 40, 64)  ->  augmented  (3, 3, 64, 67)     key head, its query head, token, column
    k             (3, 40, 64)  ->  augmented  (3, 64, 67)
    block_q       (3, 3 · 64, 67)             the three query heads of a key head, stacked
    weights       (3, 192, 64)                block_q · kᵀ, then exp, then causal
    block_grad_v  (3, 64, 64)                 weightsᵀ · grad, summed over the stacked heads by the product
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qlora_tui.memory.execution import ATTENTION_BLOCK_ROWS, EXTRA_COLUMNS
from qlora_tui.memory.levels import TOKEN_MULTIPLE


class RowAttention(torch.autograd.Function):
    """softmax(scale · q kᵀ) v, causal, for each sample of a packed sequence.

    Inputs are q (1, heads, tokens, width), k and v (1, key heads, tokens, width). The output is (1, tokens,
    heads, width), the layout that the output projection reads. Saved for the backward are q, k, v, the output
    and one float32 per query and head.
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
        # In fp32 from the start. If attention sees a single token, a score's gradient is the small difference
        # of two large numbers: after rounding to 16 bits, only rounding error would be left.
        neg_delta = grad.to(torch.float32, copy=True).mul_(out.transpose(1, 2)).sum(-1).neg_()
        extra_columns = (
            _split_precision(log_sums / -ctx.scale, query.dtype),
            _split_precision(neg_delta, query.dtype),
        )
        # Stored token by token, in the layout of the tensors that these are the gradients of.
        grads = [
            x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (query, key, value)
        ]
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
    """Return the output and the log-sum-exp of each query, computed by the kernel that SDPA would choose."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)


def _expand_kv_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values, repeated for every query head if the kernel does not support shared heads."""
    group = q.shape[1] // k.shape[1]
    if group == 1 or _kernel_supports_gqa():
        return k, v
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


@cache
def _kernel_supports_gqa() -> bool:
    """Return whether the kernel supports fewer key heads than query heads.

    The kernel of torch 2.6 accepts fewer key heads but reads past their end.
    """
    q, k = torch.ones(1, 2, 3, 16), torch.ones(1, 1, 3, 16)
    out, _ = _flash(q, k, k, 1.0)
    return torch.equal(out, q)


def _split_precision(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Split x (…), fp32, into columns of ``dtype`` (…, 3) whose sum is x.

    Each column is the rounding error left by the columns before it: in bfloat16, 0.7 is 0.69921875 +
    0.00078201 - 0.00000077. Three columns of 8 bits hold all 24. With two, an attention score of 10,000 would
    be wrong by 0.15, and its weight by a sixth; for larger scores the exponential would be wrong by orders of
    magnitude.
    """
    columns = []
    for _ in range(EXTRA_COLUMNS):
        columns.append(x.to(dtype))
        x = x - columns[-1]
    return torch.stack(columns, dim=-1)


def _augmented(x: Tensor, columns: Tensor | float, group: int = 1) -> Tensor:
    """Append columns to x (heads, tokens, width).

    Returns:
        (heads / group, group, padded tokens, width + 3).
    """
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
    """Compute the gradients of one sample and write them to ``grad_q``, ``grad_k`` and ``grad_v``.

    With P = exp(scale · q kᵀ - log_sum), D = rowsum(grad · out) and S = P · (grad vᵀ - D), the gradients are
    Pᵀ grad for v, scale · S k for q and scale · Sᵀ q for k (Dao et al. 2022, FlashAttention, B.4).

    Args:
        q, grad: augmented, (key heads, group, padded tokens, width + 3).
        k, v: augmented, (key heads, padded tokens, width + 3).
        grad_q: (heads, tokens, width).
        grad_k, grad_v: (key heads, tokens, width).
    """
    kv_heads, group, padded_tokens, _ = q.shape
    _, tokens, width = grad_k.shape
    grad_q = grad_q.view(kv_heads, group, tokens, width)
    # The gradients S of a query's scores sum to 0, so a part that all keys share (from a bias, as in Qwen2)
    # cancels in S k. After rounding to 16 bits the cancellation is not exact, and a large shared part would
    # leave an error. So the shared part is subtracted first, which changes only the rounding.
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
        # With beta=0 the placeholder is ignored, so this computes alpha · (q kᵀ) in one operation.
        probs = torch.baddbmm(placeholder, block_q, k[:, :end].transpose(1, 2), beta=0, alpha=scale).exp_()
        probs.view(kv_heads, group, end - start, end)[..., start:].tril_()
        block_grad_v = torch.bmm(probs.transpose(1, 2), block_grad[..., :width])
        grad_scores = torch.bmm(block_grad, v[:, :end].transpose(1, 2)).mul_(probs)
        block_grad_q = torch.bmm(grad_scores, centered_k[:, :end]).view(kv_heads, group, end - start, width)
        valid_tokens = min(end, tokens) - start
        torch.mul(block_grad_q[:, :, :valid_tokens], scale, out=grad_q[:, :, start : start + valid_tokens])
        block_grad_k = torch.bmm(grad_scores.transpose(1, 2), block_q[..., :width])
        # Otherwise these tensors would stay in memory together with those of the next block.
        del probs, grad_scores, block_grad_q
        if sum_k is None or sum_v is None:
            sum_k, sum_v = block_grad_k, block_grad_v
        else:
            sum_k[:, :end] += block_grad_k
            sum_v[:, :end] += block_grad_v
    assert sum_k is not None and sum_v is not None
    torch.mul(sum_k[:, :tokens], scale, out=grad_k)
    grad_v.copy_(sum_v[:, :tokens])


def token_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """Return the multiple to which the number of tokens is padded.

    It exceeds 1 only for bfloat16 on a CPU, where oneDNN computes the matrix products.
    """
    return TOKEN_MULTIPLE if device.type == "cpu" and dtype == torch.bfloat16 else 1


def pad_tokens(x: Tensor) -> Tensor:
    """Append zeros to the tokens of x (…, tokens, width), up to a multiple of :func:`token_multiple`."""
    more = padded_length(x) - x.shape[-2]
    return functional.pad(x, (0, 0, 0, more)) if more else x


def padded_length(x: Tensor) -> int:
    """Return the number of tokens of x (…, tokens, width) after padding."""
    multiple = token_multiple(x.device, x.dtype)
    return -(-x.shape[-2] // multiple) * multiple
