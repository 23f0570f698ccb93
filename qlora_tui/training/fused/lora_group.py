"""Adapted modules that read the same input as one function: queries, keys and values; gate and up.

Their A matrices are multiplied as the rows of one matrix, and the gradients of their common input are added
by the products themselves, where autograd would add three tensors. Per layer and step that saves some 20
kernels, and on a CPU products too thin to be efficient.

Shapes of SmolLM2-135M's attention at rank 16, for a packed sequence of 100 tokens::

    x         (1, 100, 576)                          saved once
    A         (48, 576)                              the rows of all three
    xa        (100, 48)                              x · Aᵀ, saved; 16 columns for each module
    outputs   (1, 100, 576), (1, 100, 192) twice     x · Wᵀ, into which scale · xa · Bᵀ is added, for each

    backward, for one gradient for each output:
    grad_xa   (100, 48)                              scale · grad · B, for each module
    grad_A    (48, 576)                              grad_xaᵀ · x
    grad_x    (100, 576)                             the sum of grad · W, then of grad_xa · A, in place

The library's code calls one module after another, so the first call computes for all, and the others take
their output from it if they are given the same tensor. With dropout each module has a mask of its own, and
so is computed by itself (:mod:`.lora_linear`).

The base's weights are dequantized one after another, each into a tensor of its own. A buffer for all layers
would need no fewer kernels, and be there at the logits' peak too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tui.training.fused.adapter_casts import AdapterCasts, Stack
from qlora_tui.training.fused.lora_linear import (
    FusedLoraLinear,
    LoraParameters,
    WeightLoader,
    active_adapter,
    add_adapter_outputs,
    cast_grads,
    grad_of_outputs,
    plain_weight,
    product_dtype,
    without_autocast,
)
from qlora_tui.training.fused.patching import patch_forward

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of modules that read the same input, in the order of their calls."""


def fuse_lora(model: nn.Module, decoder: nn.Module, casts: AdapterCasts) -> list[Stack]:
    """Fuse every plain LoRA module. DoRA, and bases whose weight is not accessible, keep peft's forward.

    Returns:
        The adapter weights of the fused modules, with those together that are multiplied together.
    """
    weights = {module: weight for module in model.modules() if (weight := plain_weight(module))}
    stacks: list[Stack] = []
    for modules in _modules_by_input(model, weights):
        shared = SharedInput([AdaptedModule(module, weights[module], casts) for module in modules])
        for member in shared.members:
            _patch_forward(member, shared)
        if len(modules) > 1:
            decoder.register_forward_pre_hook(shared.before_forward)
        names = modules[0].lora_A.keys()
        stacks += [tuple(module.lora_A[name].weight for module in modules) for name in names]
        stacks += [(module.lora_B[name].weight,) for module in modules for name in names]
    return stacks


def _modules_by_input(model: nn.Module, adapted: dict[Any, WeightLoader]) -> list[list[Any]]:
    """All adapted modules, those together that are expected to read the same input."""
    groups: list[list[Any]] = []
    for parent in model.modules():
        for names in _GROUPS:
            children: list[Any] = [getattr(parent, name, None) for name in names]
            modules = [module for module in children if module in adapted]
            # Several masks cannot be applied to one input.
            if any(getattr(part, "p", 0.0) for module in modules for part in module.lora_dropout.values()):
                continue
            if len({(module.in_features, tuple(module.lora_A)) for module in modules}) == 1:
                groups.append(modules)
    grouped = {module for modules in groups for module in modules}
    return groups + [[module] for module in adapted if module not in grouped]


@dataclass(frozen=True)
class AdaptedModule:
    """A module with a plain LoRA adapter."""

    module: Any
    weight: WeightLoader
    casts: AdapterCasts

    def adapter(self) -> LoraParameters | None:
        """The active adapter; None where it is not exactly one."""
        return active_adapter(self.module, self.module.get_base_layer(), self.weight, self.casts)


class SharedInput:
    """Modules that are computed together, and the outputs that those called later will take."""

    def __init__(self, members: Sequence[AdaptedModule]) -> None:
        self.members = members
        self._input: Tensor | None = None
        self._outputs: dict[Any, Tensor] = {}
        """Of modules that were not called yet."""
        self._is_shared = len(members) > 1

    def before_forward(self, decoder: nn.Module, args: Any) -> None:
        """Give up computing together where the last forward left an output that no module was called for.

        Only between forwards, because a recomputation must save what its forward saved.
        """
        if self._outputs:
            self._is_shared, self._outputs, self._input = False, {}, None

    def output_of(self, module: Any, x: Tensor) -> Tensor | None:
        """The output of one of the modules; None where it must be computed by itself."""
        if not (self._is_shared and torch.is_grad_enabled()):
            return None
        if module is self.members[0].module:
            self._compute(x)
        if self._input is not x or module not in self._outputs:
            return None
        output = self._outputs.pop(module)
        if not self._outputs:
            self._input = None
        return output

    def _compute(self, x: Tensor) -> None:
        """Compute all outputs, if every module has an active adapter."""
        self._outputs, self._input = {}, None
        adapters = [adapter for member in self.members if (adapter := member.adapter()) is not None]
        if len(adapters) < len(self.members):
            return
        weights = [weight for adapter in adapters for weight in (adapter.a, adapter.b)]
        outputs = FusedLoraGroup.apply(x, adapters, *weights)  # type: ignore[no-untyped-call]  # torch's own
        self._outputs = {member.module: output for member, output in zip(self.members, outputs, strict=True)}
        self._input = x


def _patch_forward(member: AdaptedModule, shared: SharedInput) -> None:
    original_forward = member.module.forward

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return original_forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        output = shared.output_of(self, x)
        if output is not None:
            return output
        adapter = member.adapter()
        if adapter is None:
            return original_forward(x)  # type: ignore[no-any-return]
        alone: Tensor = FusedLoraLinear.apply(x, adapter.a, adapter.b, adapter)  # type: ignore[no-untyped-call]
        return alone

    patch_forward(member.module, forward, "lora")


class FusedLoraGroup(torch.autograd.Function):
    """base(x) + scale · x · Aᵀ · Bᵀ of several adapters, for x (…, inputs); returns a tuple of outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, adapters: list[LoraParameters], *weights: Tensor) -> tuple[Tensor, ...]:
        outputs = tuple(adapter.base(x) for adapter in adapters)
        dtype = product_dtype(x)
        with without_autocast(x.device.type):
            xa = x.reshape(-1, x.shape[-1]).to(dtype) @ _stacked_a(adapters, dtype).t()
        for output, part, adapter in zip(outputs, _by_adapter(xa, adapters), adapters, strict=True):
            add_adapter_outputs(output, part, adapter)
        ctx.save_for_backward(x, xa)
        ctx.adapters = adapters
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, xa = ctx.saved_tensors
        adapters: list[LoraParameters] = ctx.adapters
        grads, parts, grads_b = [], [], []
        for output, part, adapter in zip(grad_outputs, _by_adapter(xa, adapters), adapters, strict=True):
            grad, grad_part, grad_b = grad_of_outputs(output, part, adapter)
            grads.append(grad)
            parts.append(grad_part)
            grads_b.append(grad_b)
        grad_xa = torch.cat(parts, dim=1)
        grad_a = grad_xa.t() @ x.reshape(-1, x.shape[-1]).to(xa.dtype)
        grads_a = torch.split(grad_a, [len(adapter.a) for adapter in adapters])
        cast = cast_grads([*grads_a, *grads_b], adapters[0].a.dtype)
        del grad_a, grads_a, grads_b
        of_a, of_b = cast[: len(adapters)], cast[len(adapters) :]
        grads_of_weights = [grad for pair in zip(of_a, of_b, strict=True) for grad in pair]
        if not ctx.needs_input_grad[0]:
            return None, None, *grads_of_weights
        grad_x: Tensor | None = None
        for grad, adapter in zip(grads, adapters, strict=True):
            weight = adapter.weight().to(grad.dtype)
            grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
            del weight  # before the next is dequantized
        assert grad_x is not None
        grad_x.addmm_(grad_xa, _stacked_a(adapters, xa.dtype))
        return grad_x.view(x.shape).to(x.dtype), None, *grads_of_weights


def _stacked_a(adapters: Sequence[LoraParameters], dtype: torch.dtype) -> Tensor:
    """The rows of every A."""
    return adapters[0].casts.cast_stack([adapter.a for adapter in adapters], dtype)


def _by_adapter(xa: Tensor, adapters: Sequence[LoraParameters]) -> tuple[Tensor, ...]:
    """The columns of each adapter."""
    return torch.split(xa, [len(adapter.a) for adapter in adapters], dim=1)
