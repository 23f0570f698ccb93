"""The end of a gated MLP, down(act(gate) · up), as two autograd functions that save only gate and up.

The library also saves the activated gate and the product, each as wide as the MLP: half of all that a layer
saves. Here the backward recomputes both from gate and up, at the cost of two elementwise passes.

There are two functions, so that all saved tensors exist before the product with down's weight. With gradient
checkpointing, a layer's recomputation ends once all saved tensors exist again, so it skips this product. In a
Llama this product takes 25 to 30 % of the arithmetic of all matrix products of a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_tui.memory.execution import GATED_MLP
from qlora_tui.training.checks.rounding import bitwise_equal
from qlora_tui.training.fused.kernel_choice import find_kernels
from qlora_tui.training.fused.lora import (
    AdaptedModule,
    AdapterCasts,
    LoraParameters,
    adapter_inputs,
    add_adapter_grad,
    add_adapter_outputs,
    grad_of_a,
    grad_of_outputs,
    plain_weight,
)
from qlora_tui.training.fused.patching import patch_forward, temporary_forwards

Activation: TypeAlias = Callable[[Tensor], Tensor]
_PARTS = {*GATED_MLP, "act_fn"}
_TOKENS = 4
"""Number of rows in the input of a check."""


def fuse_gated_mlp(model: nn.Module, casts: AdapterCasts) -> None:
    """Fuse every gated MLP whose down projection has a plain adapter."""
    for module in model.modules():
        if {name for name, _ in module.named_children()} != _PARTS:
            continue
        weight = plain_weight(module.down_proj)
        if weight is not None and is_gated(module):
            _patch_forward(module, AdaptedModule(module.down_proj, weight, casts))


def _patch_forward(mlp: Any, down: AdaptedModule) -> None:
    original_forward = mlp.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        adapter = down.adapter() if torch.is_grad_enabled() else None
        if adapter is None:
            return original_forward(x)  # type: ignore[no-any-return]
        return gated_down(self.gate_proj(x), self.up_proj(x), adapter, self.act_fn)

    patch_forward(mlp, forward, "mlp")


@torch.no_grad()
def is_gated(mlp: Any) -> bool:
    """Return whether the module's forward is exactly down(act(gate(x)) · up(x)), bit by bit.

    For the test, the outputs of the module's three projections are replaced by chosen values, so that a
    factor, a clamp or another activation is detected, and no weight is read. Every layer is tested, because
    in some models the layers differ (Gemma 3n). On ``meta``, where there are no values to compare, the result
    is True.
    """
    parameter = next(mlp.parameters())
    if parameter.is_meta:
        return True
    base = mlp.down_proj.get_base_layer() if hasattr(mlp.down_proj, "get_base_layer") else mlp.down_proj
    dtype = getattr(base, "compute_dtype", None) or parameter.dtype
    gate, up, out, x = (
        values.to(parameter.device, dtype)
        for values in _example_values(base.in_features, base.out_features, mlp.gate_proj.in_features)
    )
    received: dict[str, list[Tensor]] = {"gate_proj": [], "up_proj": [], "down_proj": []}
    returned = {"gate_proj": gate, "up_proj": up, "down_proj": out}

    def stand_in(name: str) -> Callable[[Tensor], Tensor]:
        def forward(given: Tensor) -> Tensor:
            received[name].append(given)
            return returned[name].clone()

        return forward

    training = mlp.training
    mlp.eval()
    # Some families apply dropout to the output in training mode only (Seed-OSS).
    mlp.training = True
    try:
        with temporary_forwards({getattr(mlp, name): stand_in(name) for name in received}):
            result = mlp(x)
        product = mlp.act_fn(gate) * up
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    finally:
        mlp.train(training)
    expected = {"gate_proj": x, "up_proj": x, "down_proj": product}
    return bitwise_equal(result, out) and all(
        len(received[name]) == 1 and bitwise_equal(received[name][0], expected[name]) for name in expected
    )


def _example_values(inner: int, outputs: int, inputs: int) -> tuple[Tensor, ...]:
    """Return gate and up (4, inner), down's output (4, outputs) and the input (4, inputs), with outliers.

    The gate evenly covers the range where activations are curved and differ, and one row reaches the
    hundreds, where clamps act.
    """
    generator = torch.Generator().manual_seed(0)
    up, out, x = (torch.randn(_TOKENS, width, generator=generator) for width in (inner, outputs, inputs))
    gate = torch.linspace(-8, 8, _TOKENS * inner).view(inner, _TOKENS).t().contiguous()
    gate[-1] *= 50
    for values in (up, out, x):
        values[:, :: max(values.shape[1] // 3, 1)] *= 300
    return gate, up, out, x


def gated_down(gate: Tensor, up: Tensor, adapter: LoraParameters, act: Activation) -> Tensor:
    """Return down(act(gate) · up) with its adapter, for gate and up (…, inputs of down)."""
    product, xa = _GatedProduct.apply(gate, up, adapter.a, adapter, act)  # type: ignore[no-untyped-call]  # torch's
    output: Tensor = _DownProjection.apply(product, xa, adapter.b, adapter)  # type: ignore[no-untyped-call]
    return output


def _product(gate: Tensor, up: Tensor, act: Activation) -> Tensor:
    kernels, name = _kernels_for(gate, act)
    if kernels is None:
        return act(gate) * up
    product: Tensor = kernels.gated_product(gate, up, name)
    return product


def _kernels_for(gate: Tensor, act: Activation) -> tuple[ModuleType | None, str]:
    """Return the Triton kernels and their name for the activation. If torch must compute the product, return
    None and an empty name.
    """
    kernels = find_kernels(gate.device, gate.dtype)
    name = "" if kernels is None else _name_of(act)
    return (kernels if name else None), name


@cache
def _name_of(act: Activation) -> str:
    """Return the kernels' name for an activation, recognized by its values; empty if they lack it."""
    x = torch.linspace(-9, 9, 1001)
    computed = act(x)
    if bitwise_equal(computed, functional.silu(x)):
        return "silu"
    return "gelu_tanh" if bitwise_equal(computed, functional.gelu(x, approximate="tanh")) else ""


class _GatedProduct(torch.autograd.Function):
    """product = act(gate) · up, which only :class:`_DownProjection` may read, and dropout(product) · Aᵀ
    (rows, rank).
    """

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, a: Tensor, adapter: LoraParameters, act: Activation
    ) -> tuple[Tensor, Tensor]:
        product = _product(gate, up, act)
        dropout_mask, xa = adapter_inputs(product, [adapter])
        ctx.save_for_backward(gate, up, dropout_mask)
        ctx.adapter, ctx.act = adapter, act
        return product, xa

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, dropout_mask = ctx.saved_tensors
        grad_product, grad_xa = grad_outputs
        kernels, name = _kernels_for(gate, ctx.act)
        if kernels is None:
            with torch.enable_grad():
                leaf = gate.detach().requires_grad_()
                activated = ctx.act(leaf)
            product = activated.detach() * up
        else:
            product = kernels.gated_product(gate, up, name)
        grad_a = grad_of_a(grad_xa, product, dropout_mask).to(ctx.adapter.a.dtype)
        del product
        # In place: the gradient comes from _DownProjection, the only reader of the product.
        add_adapter_grad(grad_product.view(-1, grad_product.shape[-1]), grad_xa, dropout_mask, [ctx.adapter])
        if kernels is not None:
            return *kernels.gated_product_backward(grad_product, gate, up, name), grad_a, None, None
        grad_up = grad_product * activated.detach()
        (grad_gate,) = torch.autograd.grad(activated, leaf, grad_product.mul_(up))
        return grad_gate, grad_up, grad_a, None, None


class _DownProjection(torch.autograd.Function):
    """base(product) + scale · xa · Bᵀ. Saves no tensors, so a layer's recomputation can end before it."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, xa: Tensor, b: Tensor, adapter: LoraParameters) -> Tensor:
        out: Tensor = adapter.base(product)
        add_adapter_outputs(out, xa, adapter)
        # Attributes, which activation checkpointing keeps: 16 numbers per token at rank 16.
        ctx.xa, ctx.adapter, ctx.dtype = xa, adapter, product.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        adapter = ctx.adapter
        grad, grad_xa, grad_b = grad_of_outputs(grad_outputs[0], ctx.xa, adapter)
        grad_product = (grad @ adapter.weight().to(grad.dtype)).to(ctx.dtype)
        return grad_product.view(*grad_outputs[0].shape[:-1], -1), grad_xa, grad_b.to(adapter.b.dtype), None
