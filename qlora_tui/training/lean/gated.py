"""The end of a gated MLP, down(act(gate) · up), as one function that keeps gate and up.

The library keeps the opened gate and the product beside them, each as wide as the MLP: half of what a layer
keeps in all. Both are made again from gate and up in the backward, for two elementwise passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qlora_tui.training.lean.linear import Adapter, Weight, active_adapter, backward, forward, plain_weight
from qlora_tui.training.lean.replace import replace_forward

Activation: TypeAlias = Callable[[Tensor], Tensor]
_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_AS_NEAR = 1e-2
"""Share of the largest output by which rounding may set two ways apart."""


def use_lean_mlp(model: nn.Module) -> None:
    """Let every gated MLP whose last module has a plain adapter compute so."""
    known: dict[type[nn.Module], bool] = {}
    for module in model.modules():
        if {name for name, _ in module.named_children()} != _PARTS:
            continue
        weight = plain_weight(module.down_proj)
        if weight is not None:
            _replace_forward(module, weight, known)


def _replace_forward(mlp: Any, weight: Weight, known: dict[type[nn.Module], bool]) -> None:
    down = mlp.down_proj
    base = down.get_base_layer()
    kind, stock = type(mlp), mlp.forward
    if kind not in known:
        known[kind] = _does_nothing_else(mlp, base)
    if not known[kind]:
        return

    def forward(self: Any, x: Tensor) -> Tensor:
        adapter = active_adapter(down, base, weight) if torch.is_grad_enabled() else None
        if adapter is None:
            return stock(x)  # type: ignore[no-any-return]
        made: Tensor = _LeanGated.apply(  # type: ignore[no-untyped-call]  # torch's own
            self.gate_proj(x), self.up_proj(x), adapter.a, adapter.b, adapter, self.act_fn
        )
        return made

    replace_forward(mlp, forward, "mlp")


@torch.no_grad()
def _does_nothing_else(mlp: Any, base: nn.Module) -> bool:
    """Whether the family's forward is the formula above, tried on two rows but on ``meta``."""
    example = next(base.parameters())
    if example.is_meta:
        return True
    width = mlp.gate_proj.in_features
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(base, "compute_dtype", None) or example.dtype
    x = torch.randn(1, 2, width, generator=generator).to(example.device, dtype)
    training = mlp.training
    mlp.eval()
    # Families drop some of what comes out (Seed-OSS); what the adapters drop is no matter here.
    mlp.training = True
    found, expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)), mlp(x)
    mlp.train(training)
    return float((found - expected).abs().max()) <= _AS_NEAR * float(expected.abs().max())


class _LeanGated(torch.autograd.Function):
    """down(act(gate) · up) with its adapter, for gate and up (…, inputs of down)."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, a: Tensor, b: Tensor, adapter: Adapter, act: Activation
    ) -> Tensor:
        out, kept, thin = forward(act(gate) * up, adapter)
        ctx.save_for_backward(gate, up, kept, thin, a, b)
        ctx.adapter, ctx.act = adapter, act
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, kept, thin, a, b = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            opened = ctx.act(leaf)
        product = opened.detach() * up
        toward, toward_a, toward_b = backward(grad_outputs[0], product, kept, thin, a, b, ctx.adapter)
        del product
        assert toward is not None
        toward_up = toward * opened.detach()
        (toward_gate,) = torch.autograd.grad(opened, leaf, toward.mul_(up))
        return toward_gate, toward_up, toward_a, toward_b, None, None
