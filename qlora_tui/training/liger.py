"""Liger's fused linear cross-entropy in place of our chunks, on a card where it is installed.

Its Triton kernel makes a loss and its gradient in one pass over logits that stay in 16 bits, where ours makes
several over logits in fp32. It sums the losses of the positions it is given, so prompt tokens are passed over
here as well. Rows of the head that are others, and tokens that count for more or less, stay ours; so does
float16, whose gradients Liger would keep in 16 bits, where they vanish before the loss scale is applied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from qlora_tui.training.loss import Head, chunked_sum

SummedLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""The sum of the losses of states (tokens, hidden) against targets (tokens), fp32."""

_TOKENS = 256
"""Enough that Liger cuts them into several chunks, of several rows each in most models."""
_COUNTS = 0.125
"""What the loss is multiplied by before its backward, as a step divides it by its tokens."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""Share of its own size by which a loss, or a gradient as a whole, may differ from ours."""


def proven_liger(head: Head, device: torch.device) -> SummedLoss | str:
    """Liger's loss for this head; why not, where it does not run here or differs from ours.

    Triton compiles it on the spot, with the C compiler it finds, so anything may be raised.
    """
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=head.softcap)

        def summed(states: Tensor, targets: Tensor) -> Tensor:
            weight, bias = head.projection.weight, head.projection.bias
            scaled = states if head.multiplier == 1.0 else states * head.multiplier
            made: Tensor = fused(weight, scaled.to(weight.dtype), targets, bias)
            return made

        differs = _difference(summed, head, device)
    except Exception as error:
        said = str(error).strip()
        return f"Liger does not run here ({type(error).__name__}: {said.splitlines()[0] if said else '?'})"
    return summed if differs is None else f"Liger's {differs} is not the model's own"


def _difference(summed: SummedLoss, head: Head, device: torch.device) -> str | None:
    """What differs from our own loss on states as a norm gives them, larger where there is a softcap."""
    weight = head.projection.weight
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(_TOKENS, weight.shape[1], generator=generator).to(device, weight.dtype)
    targets = torch.randint(weight.shape[0], (_TOKENS,), generator=generator).to(device)
    if head.softcap is not None:
        states *= head.softcap / (states[:8] @ weight.t() * head.multiplier).std()
    sums = []
    for way in (summed, partial(chunked_sum, head=head)):
        given = states.clone().requires_grad_(True)
        total = way(given, targets)
        (gradient,) = torch.autograd.grad(total * _COUNTS, given)
        sums.append((total.detach().float(), gradient.float()))
    (loss, gradient), (our_loss, our_gradient) = sums
    for name, made, wanted in (("loss", loss, our_loss), ("gradient", gradient, our_gradient)):
        # Written so that NaN differs.
        if not (made - wanted).norm() <= _TOLERANCE[weight.dtype] * wanted.norm():
            return name
    return None
