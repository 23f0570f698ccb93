"""The reference for 4-bit experts: the family's own code, on weights that are dequantized when it uses them.

transformers' classes loop over the experts that have tokens, and index the fused parameters with each
(``self.gate_up_proj[expert]``). Here these names stand for objects whose products dequantize one expert's
matrix, forward and again backward. An adapter adds its own products, computed by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qlora_tui.training.experts.experts_4bit import PROJECTIONS, Experts4bit
from qlora_tui.training.experts.routed_function import ExpertAdapter


def reference_forward(
    experts: Experts4bit, inputs: tuple[Tensor, Tensor, Tensor], adapters: dict[str, ExpertAdapter]
) -> Tensor:
    """The output (tokens, hidden) of the family's own forward.

    Args:
        experts: 4-bit experts.
        inputs: hidden states (tokens, hidden), chosen experts and routing weights (tokens, per_token).
        adapters: the adapter of each adapted projection, by its name.
    """
    factors = [factor for adapter in adapters.values() for factor in (adapter.a, adapter.b)]
    out: Tensor = _Rerun.apply(experts, adapters, *inputs, *factors)  # type: ignore[no-untyped-call]  # torch's own
    return out


class _Rerun(torch.autograd.Function):
    """The family's forward, run again in the backward: what it saves has other shapes for other routes.

    So it works in a checkpointed layer whose recomputation differs by rounding errors, as in the check of the
    first step, and sends a token elsewhere.
    """

    @staticmethod
    def forward(
        ctx: Any, experts: Experts4bit, adapters: dict[str, ExpertAdapter], *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.experts, ctx.adapters = experts, adapters
        ctx.autocast = torch.is_autocast_enabled(tensors[0].device.type)
        return _run(experts, adapters, tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [
            saved.detach().requires_grad_(needed)
            for saved, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        with torch.enable_grad(), torch.autocast(leaves[0].device.type, enabled=ctx.autocast):
            out = _run(ctx.experts, ctx.adapters, leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = iter(torch.autograd.grad(out, wanted, grad_outputs, allow_unused=True))
        return None, None, *(next(grads) if leaf.requires_grad else None for leaf in leaves)


def _run(experts: Experts4bit, adapters: dict[str, ExpertAdapter], tensors: Sequence[Tensor]) -> Tensor:
    """The family's forward on hidden states, chosen experts, routing weights, and A and B of each adapter."""
    factors = iter(tensors[3:])
    given = {name: replace(adapter, a=next(factors), b=next(factors)) for name, adapter in adapters.items()}
    forward = type(experts.family).forward
    out: Tensor = getattr(forward, "__wrapped__", forward)(_FamilyView(experts, given), *tensors[:3])
    return out


class _FamilyView:
    """What a family's forward reads of its module, with 4-bit projections."""

    def __init__(self, experts: Experts4bit, adapters: dict[str, ExpertAdapter]) -> None:
        self._family = experts.family
        for name in PROJECTIONS:
            setattr(self, name, _Indexed(experts, name, adapters.get(name)))
            setattr(self, f"{name}_bias", experts.bias(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)


class _Indexed:
    """A fused parameter that is only indexed with one expert."""

    def __init__(self, experts: Experts4bit, name: str, adapter: ExpertAdapter | None) -> None:
        self._experts, self._name, self._adapter = experts, name, adapter

    def __getitem__(self, expert: Any) -> _ExpertMatrix:
        return _ExpertMatrix(self._experts, self._name, int(expert), self._adapter)


class _ExpertMatrix:
    """One expert's matrix, as an operand of ``functional.linear(x, matrix)`` or ``x @ matrix``."""

    def __init__(self, experts: Experts4bit, name: str, expert: int, adapter: ExpertAdapter | None) -> None:
        self._experts, self._name, self._expert, self._adapter = experts, name, expert, adapter

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if len(args) == 2 and isinstance(args[1], cls) and not kwargs:
            if function is functional.linear:
                return args[1]._product(args[0], transposed=False)
            if function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
                return args[1]._product(args[0], transposed=True)
        return NotImplemented

    def _product(self, x: Tensor, *, transposed: bool) -> Tensor:
        arguments = (x, self._experts, self._name, self._expert, transposed)
        out: Tensor = _DequantizedProduct.apply(*arguments)  # type: ignore[no-untyped-call]  # torch's own
        if self._adapter is None:
            return out
        a, b = (side(self._expert, x.dtype) for side in (self._adapter.a_of, self._adapter.b_of))
        return out + (x @ a.t()) @ b.t() * self._adapter.scaling


class _DequantizedProduct(torch.autograd.Function):
    """x · Wᵀ, or x · W where W is stored transposed, which saves neither."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, experts: Experts4bit, name: str, expert: int, transposed: bool
    ) -> Tensor:
        ctx.weight = experts, name, expert, transposed
        matrix = experts.matrix(name, expert, x.dtype)
        return x @ (matrix if transposed else matrix.t())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        experts, name, expert, transposed = ctx.weight
        (grad,) = grad_outputs
        matrix = experts.matrix(name, expert, grad.dtype)
        return grad @ (matrix.t() if transposed else matrix), None, None, None, None
