"""RMSNorm as one autograd function that saves its input as it is and one number per row.

transformers computes it in several operations and saves an fp32 copy of the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qlora_tui.training.agreement import equal_up_to_rounding
from qlora_tui.training.fused.kernel_choice import find_kernels
from qlora_tui.training.fused.patching import patch_forward


@dataclass(frozen=True)
class RmsNormVariant:
    """How a model family multiplies by the weight of its norms."""

    offset: float = 0.0
    """Added to the weight: 1 in Gemma, else 0."""
    multiply_in_fp32: bool = False
    """Whether the product is in fp32 and cast last (Gemma, OLMo-2), or the input is cast first (Llama)."""


_VARIANTS = (
    RmsNormVariant(),
    RmsNormVariant(multiply_in_fp32=True),
    RmsNormVariant(offset=1.0, multiply_in_fp32=True),
)


def fuse_rms_norm(model: nn.Module) -> None:
    """Fuse every frozen RMSNorm that computes a known variant."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and (variant := _find_variant(module)):
            _patch_forward(module, variant)


def _patch_forward(norm: Any, variant: RmsNormVariant) -> None:
    original_forward, eps = norm.forward, _eps_of(norm)

    def forward(self: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return original_forward(x)  # type: ignore[no-any-return]
        output: Tensor = _FusedRmsNorm.apply(x, self.weight, eps, variant)  # type: ignore[no-untyped-call]
        return output

    patch_forward(norm, forward, "norms")


def _eps_of(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@torch.no_grad()
def _find_variant(norm: Any) -> RmsNormVariant | None:
    """The variant that computes what the module computes; None where none or several do.

    Trained weights may hide the difference (Gemma's reach 1,656, where adding 1 is below the resolution of
    bfloat16), so the module is also run with weights between -3 and 3.
    """
    weight, eps = getattr(norm, "weight", None), _eps_of(norm)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if weight.requires_grad or sum(1 for _ in norm.parameters()) != 1:
        return None
    if weight.is_meta:  # every variant saves the same for the backward
        return _VARIANTS[0]
    x = _example_rows(len(weight), eps).to(weight.device, weight.dtype)
    matching = set(_distinguishable_variants(weight.dtype))
    for values in (torch.linspace(-3, 3, len(weight)).to(weight), weight):
        expected = functional_call(norm, {"weight": values}, (x,))
        matching = {
            variant
            for variant in matching
            if equal_up_to_rounding(_rms_norm(x, values, eps, variant)[0], expected)
        }
    return matching.pop() if len(matching) == 1 else None


def _distinguishable_variants(dtype: torch.dtype) -> tuple[RmsNormVariant, ...]:
    """The variants that differ in ``dtype``: in float32 it does not matter when the product is cast."""
    return _VARIANTS[1:] if dtype == torch.float32 else _VARIANTS


def _example_rows(width: int, eps: float) -> Tensor:
    """Inputs (4, width) that distinguish variants.

    One row has typical values, one a few massive channels, one a mean far from 0, and one is so small that
    epsilon is half of the value under the root.
    """
    rows = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    rows[0] *= 3
    rows[1, :: max(width // 3, 1)] *= 1000
    rows[2] += 2
    rows[3] *= max(eps, 1e-9) ** 0.5
    return rows


def _rms_norm(x: Tensor, weight: Tensor, eps: float, variant: RmsNormVariant) -> tuple[Tensor, Tensor]:
    """The output, and 1 / root mean square of each row, fp32, computed by torch."""
    # Not vector_norm: it adds in plain order, whose error grows with the row; mean adds pairwise.
    squares = x.to(torch.float32, copy=True).square_()
    inv_rms = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
    del squares
    wide = x.to(torch.float32, copy=True).mul_(inv_rms)
    if variant.multiply_in_fp32:
        return wide.mul_(_factor(weight, variant)).to(x.dtype), inv_rms
    narrow = wide.to(x.dtype)
    # A weight with more bits than the input gives an output with more bits.
    return narrow.mul_(weight) if weight.dtype == x.dtype else narrow * weight, inv_rms


def _factor(weight: Tensor, variant: RmsNormVariant) -> Tensor:
    return weight.float() + variant.offset


def _kernels_for(x: Tensor) -> ModuleType | None:
    """Triton's kernels for rows of this width; None where torch computes."""
    kernels = find_kernels(x.device, x.dtype)
    return kernels if kernels is not None and kernels.fits_row(x.shape[-1]) else None


class _FusedRmsNorm(torch.autograd.Function):
    """weight · x / rms(x) over the last dimension; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, variant: RmsNormVariant) -> Tensor:
        kernels = _kernels_for(x)
        if kernels is None:
            out, inv_rms = _rms_norm(x, weight, eps, variant)
        else:
            out, inv_rms = kernels.rms_norm(
                x, weight, eps, offset=variant.offset, in_fp32=variant.multiply_in_fp32
            )
        ctx.save_for_backward(x, inv_rms)
        ctx.weight, ctx.variant = weight, variant
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, inv_rms = ctx.saved_tensors
        kernels = _kernels_for(x)
        if kernels is not None:
            grad_x: Tensor = kernels.rms_norm_backward(
                grad_outputs[0], x, ctx.weight, inv_rms, offset=ctx.variant.offset
            )
            return grad_x, None, None, None
        grad_normed = grad_outputs[0].to(torch.float32, copy=True).mul_(_factor(ctx.weight, ctx.variant))
        normed = x.to(torch.float32, copy=True).mul_(inv_rms)
        projection = (grad_normed * normed).sum(-1, keepdim=True).div_(-x.shape[-1])
        return grad_normed.addcmul_(normed, projection).mul_(inv_rms).to(x.dtype), None, None, None
