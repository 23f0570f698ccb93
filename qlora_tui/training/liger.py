"""Replaces our chunks with Liger's fused linear cross-entropy, on a GPU if Liger is installed and faster.

Liger's Triton kernel computes a loss and its gradient in one pass over 16-bit logits, while our loss takes
several passes over fp32 logits. The kernel receives only the positions in the loss, so prompt tokens have no
logits here either. The larger the vocabulary, the fewer rows Liger processes at a time, and it reads the
whole head twice for each chunk. So it is used if its chunks have at least as many rows as ours
(``memory/execution.py``). Our chunks are used if the head or rows of it are trained, if tokens have loss
weights, if answers are compared, and in float16. Liger would keep float16 gradients in 16 bits, in which they
vanish before the loss scale is applied.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qlora_tui.training.checks.rounding import within_noise
from qlora_tui.training.loss import ChunkedHead, LossSumFn, chunked_sum, losses_and_grads

_TOKENS = 256
"""Number of tokens in the check: enough for several chunks of several rows in Liger with most models."""
_LOSS_FACTOR = 0.125
"""Factor applied to the loss before the backward pass. It resembles the division by a step's number of
tokens.
"""
_LOGIT_STD = 4.0
"""Standard deviation of a position's logits in the check, for a head without a soft cap.

A few logits then dominate the softmax, and their part of the gradient is as large as the target's.
"""
_TOLERANCES = {32: 1e-4, 16: 2e-3}
"""Maximum relative difference of the summed loss from the exact one, keyed by the head's bits."""
_NOISE = 6.0
"""Maximum error of an element of Liger's gradient, as a multiple of our error at the same token."""
_ROUNDINGS = {32: 64.0, 16: 1.0}
"""Smallest value that the check assumes for our error, keyed by the bits of the head's dtype.

The unit is the rounding error of the summed terms.

In fp32 the rounding of a logit is many times the rounding of its probability.
"""
_CHUNK_TOKENS = 32
_CHUNK_ROWS = 8192
"""Number of tokens, and of rows of the head, that are computed in fp32 at a time."""


def verified_liger_loss(head: ChunkedHead, device: torch.device) -> LossSumFn | str:
    """Return Liger's loss for this head, or the reason why it is not used: it fails or differs from ours.

    Triton compiles the kernel at the first call, with the C compiler that it finds, so any exception may
    occur.
    """
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=head.softcap)

        def summed(states: Tensor, targets: Tensor) -> Tensor:
            weight, bias = head.projection.weight, head.projection.bias
            scaled = states if head.multiplier == 1.0 else states * head.multiplier
            loss_sum: Tensor = fused(weight, scaled.to(weight.dtype), targets, bias)
            return loss_sum

        differs = _difference(summed, head, device)
    except Exception as error:
        message = str(error).strip()
        return f"Liger fails here ({type(error).__name__}: {message.splitlines()[0] if message else '?'})"
    return summed if differs is None else f"Liger's {differs} differs from the model's"


def _difference(summed: LossSumFn, head: ChunkedHead, device: torch.device) -> str | None:
    """Return which of Liger's results is too inexact, ``loss`` or ``gradient``; None if neither is.

    Both results are compared with fp32. The tolerance of the gradient is a multiple of our gradient's
    error. The states give logits that are as far apart as a trained model's.
    """
    weight = head.projection.weight
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(_TOKENS, weight.shape[1], generator=generator).to(device, weight.dtype)
    targets = torch.randint(weight.shape[0], (_TOKENS,), generator=generator).to(device)
    std = (states[:8] @ weight.t() * head.multiplier).float().std()
    states *= (head.softcap or _LOGIT_STD) / std.to(states.dtype)
    bits = 8 * weight.element_size()
    totals, gradients = [], []
    for loss_fn in (summed, partial(chunked_sum, head=head)):
        given = states.clone().requires_grad_(True)
        total = loss_fn(given, targets)
        (gradient,) = torch.autograd.grad(total * _LOSS_FACTOR, given)
        totals.append(total.detach().float())
        gradients.append(gradient.float() / _LOSS_FACTOR)
    loss, exact, scale = _exact(states, targets, head)
    # This form of the comparison counts NaN as a difference.
    if not (totals[0] - loss).abs() <= _TOLERANCES[bits] * loss:
        return "loss"
    noise = (gradients[1] - exact).square().mean(-1, keepdim=True).sqrt()
    least = _ROUNDINGS[bits] * torch.finfo(weight.dtype).eps * scale
    is_same = within_noise(gradients[0], exact, torch.maximum(noise, least), _NOISE)
    return None if is_same else "gradient"


@torch.no_grad()
def _exact(states: Tensor, targets: Tensor, head: ChunkedHead) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss in fp32, its gradient, and the scale of the gradient's rounding error.

    The gradient is with respect to ``states``. Gradient and scale are (tokens, hidden). A gradient is a sum
    over the vocabulary, so its rounding error scales with the root of the sum of squares of its terms.
    """
    losses, gradients, scales = [], [], []
    parts = torch.split(head.projection.weight, _CHUNK_ROWS)
    for chunk, target in zip(
        torch.split(states, _CHUNK_TOKENS), torch.split(targets, _CHUNK_TOKENS), strict=True
    ):
        logits = torch.cat([chunk.float() @ part.float().t() for part in parts], dim=1)
        if head.projection.bias is not None:
            logits += head.projection.bias.float()
        chunk_losses, logit_grads = losses_and_grads(logits, target[:, None], head, needs_grad=True)
        assert logit_grads is not None
        gradient, squares = torch.zeros_like(chunk, dtype=torch.float32), torch.zeros_like(chunk).float()
        for logit_grad, part in zip(torch.split(logit_grads, _CHUNK_ROWS, dim=1), parts, strict=True):
            gradient += logit_grad @ part.float()
            squares += logit_grad.square() @ part.float().square()
        losses.append(chunk_losses.sum())
        gradients.append(gradient)
        scales.append(squares.sqrt())
    return torch.stack(losses).sum(), torch.cat(gradients), torch.cat(scales)
