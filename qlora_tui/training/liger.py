"""Liger's fused linear cross-entropy in place of our chunks, on a card where it is installed and pays.

Its Triton kernel makes a loss and its gradient in one pass over logits that stay in 16 bits, where ours makes
several over logits in fp32. It sums the losses of the positions it is given, so prompt tokens are passed over
here as well. It makes the fewer rows at a time the larger the vocabulary, and reads the whole head twice for
each: it is taken where they are no fewer than ours (``memory/codepath.py``). Other rows of the head, and
tokens that count for more or less, stay ours; so does float16, whose gradients Liger would keep in 16 bits,
where they vanish before the loss scale is applied.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qlora_tui.training.loss import Head, SummedLoss, chunked_sum

_TOKENS = 256
"""Enough that Liger cuts them into several chunks, of several rows each in most models."""
_COUNTS = 0.125
"""What the loss is multiplied by before its backward, as a step divides it by its tokens."""
_SPREAD = 4.0
"""Standard deviation of a position's logits: its softmax then rests on a few of them, and its part of the
gradient is as large as the target's own."""
_TOLERANCES = {32: {"loss": 1e-4, "gradient": 1e-3}, 16: {"loss": 2e-3, "gradient": 3e-2}}
"""Share of its own size by which a loss, or a gradient, may differ from ours, by the bits of the head."""


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
    """What differs from our own loss, on states whose logits are as far apart as a trained model's."""
    weight = head.projection.weight
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(_TOKENS, weight.shape[1], generator=generator).to(device, weight.dtype)
    targets = torch.randint(weight.shape[0], (_TOKENS,), generator=generator).to(device)
    spread = (states[:8] @ weight.t() * head.multiplier).float().std()
    states *= (head.softcap or _SPREAD) / spread.to(states.dtype)
    sums = []
    for way in (summed, partial(chunked_sum, head=head)):
        given = states.clone().requires_grad_(True)
        total = way(given, targets)
        (gradient,) = torch.autograd.grad(total * _COUNTS, given)
        sums.append((total.detach().float(), gradient.float()))
    (loss, gradient), (our_loss, our_gradient) = sums
    tolerances = _TOLERANCES[8 * weight.element_size()]
    for name, made, wanted in (("loss", loss, our_loss), ("gradient", gradient, our_gradient)):
        # Written so that NaN differs.
        if not (made - wanted).norm() <= tolerances[name] * wanted.norm():
            return name
    return None
