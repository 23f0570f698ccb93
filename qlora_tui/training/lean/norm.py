"""RMSNorm as one function that keeps its input as it came and one number a row.

transformers writes it out, a tensor a step, and keeps the input's fp32 copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_AS_NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Share of the largest output by which rounding may set two ways apart."""


@dataclass(frozen=True)
class Form:
    """How a family multiplies by its weight."""

    offset: float = 0.0
    """Added to the weight: Gemma's is 1."""
    in_float: bool = False
    """The product is taken in fp32 and cast last (Gemma, OLMo-2), or cast first (Llama)."""


_FORMS = (Form(), Form(in_float=True), Form(offset=1.0, in_float=True))


def use_lean_norms(model: nn.Module) -> None:
    """Let every frozen RMSNorm that is one of the known forms compute so."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and (form := _form_of(module)):
            _replace_forward(module, form)


def _replace_forward(norm: Any, form: Form) -> None:
    stock, eps = norm.forward, _eps_of(norm)

    def forward(self: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return stock(x)  # type: ignore[no-any-return]
        made: Tensor = _LeanNorm.apply(x, self.weight, eps, form)  # type: ignore[no-untyped-call]
        return made

    norm.forward = MethodType(forward, norm)


def _eps_of(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@torch.no_grad()
def _form_of(norm: Any) -> Form | None:
    """The form that gives what the module gives, tried on two rows; None where none does."""
    weight, eps = getattr(norm, "weight", None), _eps_of(norm)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if weight.requires_grad or sum(1 for _ in norm.parameters()) != 1:
        return None
    if weight.is_meta:  # all keep the same
        return _FORMS[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, len(weight), generator=generator).mul_(3).to(weight.device, weight.dtype)
    expected = norm(x)
    for form in _FORMS:
        found, _ = _normed(x, weight, eps, form)
        if found.dtype == expected.dtype and _is_near(found, expected):
            return form
    return None


def _is_near(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= _AS_NEAR[found.dtype] * float(expected.abs().max())


def _normed(x: Tensor, weight: Tensor, eps: float, form: Form) -> tuple[Tensor, Tensor]:
    """The output, and 1 / root mean square of each row, fp32."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    spread = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    wide = x.to(torch.float32, copy=True).mul_(spread)
    if form.in_float:
        return wide.mul_(_factor(weight, form)).to(x.dtype), spread
    return wide.to(x.dtype).mul_(weight), spread


def _factor(weight: Tensor, form: Form) -> Tensor:
    return weight.float() + form.offset


class _LeanNorm(torch.autograd.Function):
    """weight · x / rms(x) over the last dimension; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, form: Form) -> Tensor:
        out, spread = _normed(x, weight, eps, form)
        ctx.save_for_backward(x, spread)
        ctx.weight, ctx.form = weight, form
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, spread = ctx.saved_tensors
        toward = grad_outputs[0].to(torch.float32, copy=True).mul_(_factor(ctx.weight, ctx.form))
        normed = x.to(torch.float32, copy=True).mul_(spread)
        along = (toward * normed).sum(-1, keepdim=True).div_(-x.shape[-1])
        return toward.addcmul_(normed, along).mul_(spread).to(x.dtype), None, None, None
