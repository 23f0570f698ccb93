"""Dropout that draws a quarter of the random numbers, for CPUs.

There a step with dropout spends a third of its time drawing masks, one 64-bit number an element. Sixteen bits
decide as well: a probability is then right to 1/65,536.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_WORDS = 4
"""Decisions from one 64-bit number."""
_VALUES = 1 << 16
"""Values of each."""


class QuickDropout(nn.Module):
    """As ``nn.Dropout``: zeroes a share ``p`` of what passes in training, and scales the rest up."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        """A tensor of any shape."""
        if not self.training or self.p == 0:
            return values
        dropped: Tensor = _Drop.apply(values, self.p)  # type: ignore[no-untyped-call]  # torch's own
        return dropped

    def extra_repr(self) -> str:
        return f"p={self.p}"


def use_quick_dropout(model: nn.Module) -> None:
    """Put it in the place of every ``nn.Dropout`` of the adapter."""
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict):
            for name, dropout in dropouts.items():
                if isinstance(dropout, nn.Dropout):
                    dropouts[name] = QuickDropout(dropout.p)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, p: float) -> Tensor:
        count = values.numel()
        drawn = torch.empty(-(-count // _WORDS), dtype=torch.int64).random_(-(1 << 63), None)
        # Signed words: the lowest share p of their values drops.
        kept = drawn.view(torch.int16)[:count].view(values.shape) >= round(p * _VALUES) - _VALUES // 2
        ctx.scale = 1 / (1 - p)
        ctx.save_for_backward(kept)
        return _masked(values, kept, ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return _masked(grad_outputs[0], kept, ctx.scale), None


def _masked(values: Tensor, kept: Tensor, scale: float) -> Tensor:
    """values · kept · scale in one pass: what torch's own dropout does in its backward."""
    return torch.ops.aten.native_dropout_backward(values, kept, scale)  # type: ignore[no-any-return]
