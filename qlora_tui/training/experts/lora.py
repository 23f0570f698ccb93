"""LoRA on the experts of a layer, in place of peft's ``ParamWrapper``, and the reference for it.

peft adapts a fused parameter (``target_parameters``) by adding the update to the entire parameter before each
forward, which needs 16-bit weights and a second copy of them. Here each expert's factors are applied to its
own tokens. peft still creates and saves the factors. While it creates them for 4-bit experts, it must see the
shapes of 16-bit parameters (:func:`as_fused_parameters`).

The reference is the family's own code, on weights that are dequantized when the code uses them. transformers'
classes loop over the experts that have tokens, and index the fused parameters by expert
(``self.gate_up_proj[expert]``). Here ``self.gate_up_proj`` and ``self.down_proj`` are objects instead. A
product with such an object dequantizes one expert's matrix, once in the forward and again in the backward. An
adapter's product is added to it, and autograd computes the gradients of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_tui.training.experts.routing import (
    PROJECTIONS,
    ExpertAdapter,
    Experts4bit,
    experts_4bit,
    is_fused_experts,
    routed_experts,
    routed_layer,
)
from qlora_tui.training.fused.patching import patch_forward


class _Rerun(torch.autograd.Function):
    """The family's forward, run again in the backward.

    The shapes of tensors saved inside would depend on the routes. In a checkpointed layer, the recomputation
    may route a token to another expert because of rounding errors, as in the check of the first step. Running
    the forward again works in that case too.
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
    """Return the output of the family's forward.

    Args:
        experts: the module with 4-bit experts.
        adapters: the adapters of its projections.
        tensors: hidden states, chosen experts, routing weights, and A and B of each adapter.
    """
    factors = iter(tensors[3:])
    given = {name: replace(adapter, a=next(factors), b=next(factors)) for name, adapter in adapters.items()}
    forward = type(experts.family).forward
    out: Tensor = getattr(forward, "__wrapped__", forward)(_FamilyView(experts, given), *tensors[:3])
    return out


class _FamilyView:
    """Stands in for the module in a family's forward: has the module's attributes, but 4-bit projections."""

    def __init__(self, experts: Experts4bit, adapters: dict[str, ExpertAdapter]) -> None:
        self._experts = experts
        for name in PROJECTIONS:
            setattr(self, name, _Matrices(experts, name, adapters.get(name)))
            setattr(self, f"{name}_bias", getattr(experts, f"{name}_bias", None))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts.family, name)


@dataclass(frozen=True)
class _Matrices:
    """Stands in for a fused parameter that the family's code only indexes with one expert at a time.

    The result of indexing is an operand of ``functional.linear(x, matrix)`` or ``x @ matrix``.
    """

    experts: Experts4bit
    name: str
    adapter: ExpertAdapter | None
    expert: int = -1

    def __getitem__(self, expert: Any) -> _Matrices:
        return replace(self, expert=int(expert))

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
        arguments = (x, self.experts, self.name, self.expert, transposed)
        out: Tensor = _DequantizedProduct.apply(*arguments)  # type: ignore[no-untyped-call]  # torch's own
        if self.adapter is None:
            return out
        a, b = (side(self.expert, x.dtype) for side in (self.adapter.a_of, self.adapter.b_of))
        return out + (x @ a.t()) @ b.t() * self.adapter.scaling


class _DequantizedProduct(torch.autograd.Function):
    """x · Wᵀ, or x · W if W is stored transposed; saves neither x nor W for the backward."""

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


ActiveName = Callable[[Any], str | None]
"""Returns the name of the adapter that a peft wrapper uses, or None."""


@contextmanager
def as_fused_parameters(model: nn.Module) -> Iterator[None]:
    """Show 4-bit experts to peft as 3-D float32 placeholders, each with the storage of a single element."""
    packed = {module: dict(module._parameters) for _, module in experts_4bit(model)}
    for module in packed:
        for name in PROJECTIONS:
            layout = module.layout(name)
            shown = torch.empty((), device=module.get_parameter(name).device)
            module._parameters[name] = nn.Parameter(
                shown.expand(layout.experts, layout.rows, layout.columns), requires_grad=False
            )
    try:
        yield
    finally:
        for module, parameters in packed.items():
            module._parameters.update(parameters)


def fuse_experts(model: nn.Module, active: ActiveName | None = None) -> None:
    """Make each layer of a ``PeftModel`` compute its experts one after another, with their adapters.

    Args:
        active: returns the name of the adapter to use; if None, the adapter that peft has activated is used.
    """
    inner = {wrapper.base_layer for wrapper in _wrappers(model)}
    outer = [wrapper for wrapper in _wrappers(model) if wrapper not in inner]
    wrapped = {wrapper.get_base_layer() for wrapper in outer}
    for module in [*outer, *(experts for _, experts in experts_4bit(model) if experts not in wrapped)]:
        base = module.get_base_layer() if module in outer else module
        if not isinstance(base, Experts4bit) and not is_fused_experts(base):
            continue
        vars(module).pop("forward", None)  # left by an earlier adapter
        if isinstance(base, Experts4bit):
            vars(module)["forward"] = MethodType(_reference, module)
        patch_forward(module, _routed(active or active_in_peft), "experts")


def _routed(active: ActiveName) -> Callable[..., Tensor]:
    def forward(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return routed_experts(x, chosen, weights, routed_layer(_base(module), _adapters(module, active)))

    return forward


def _reference(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Return the output (tokens, hidden) of the family's own forward, on 4-bit experts with adapters."""
    adapters = _adapters(module, active_in_peft)
    factors = [factor for adapter in adapters.values() for factor in (adapter.a, adapter.b)]
    arguments = (_base(module), adapters, x, chosen, weights, *factors)
    out: Tensor = _Rerun.apply(*arguments)  # type: ignore[no-untyped-call]  # torch's own
    return out


def _adapters(module: Any, active: ActiveName) -> dict[str, ExpertAdapter]:
    """Return the active adapter of each adapted projection, keyed by the projection's name.

    Args:
        module: the outermost wrapper.
    """
    adapters = {}
    while is_parameter_wrapper(module):
        name = active(module)
        if name is not None and name in module.lora_A:
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            adapters[module.parameter_name] = ExpertAdapter(a, b, module.scaling[name], module.num_experts)
        module = module.base_layer
    return adapters


def active_in_peft(wrapper: Any) -> str | None:
    """Return the adapter that peft has activated in a wrapper; None if adapters are disabled."""
    names = wrapper.active_adapters
    if len(names) > 1:
        raise NotImplementedError("several adapters at once on the experts of a layer")
    return names[0] if names and not wrapper.disable_adapters else None


def _base(module: Any) -> Any:
    return module.get_base_layer() if is_parameter_wrapper(module) else module


def _wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_parameter_wrapper(module)]


def is_parameter_wrapper(module: nn.Module) -> bool:
    """Return whether a module is peft's wrapper of a single parameter.

    Compares the class name, because importing peft takes seconds.
    """
    return type(module).__name__ == "ParamWrapper"
