"""A frozen linear module and its adapter as one function, in place of peft's forward.

peft copies the base's output, casts each target's input to the adapter's fp32, keeps that copy (and with
dropout another), and multiplies in fp32. Here the input is kept as it came, so that the targets reading one
hidden state share it; dropout keeps one byte an element; the products are in the compute dtype, as under
autocast; and the backward adds both gradients of the input in place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qlora_tui.training.fused.patching import patch_forward

_WORDS = 4
"""Decisions to drop or keep from one 64-bit random number."""
_VALUES = 1 << 15
"""Values of each: on a CPU a probability is right to 1/32,768."""
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


WeightLoader: TypeAlias = Callable[[], Tensor]
"""Gives a base's weight, (outputs, inputs), in 16 or 32 bits."""


@dataclass(frozen=True)
class LoraParameters:
    """One adapter on one frozen module, as it computes at this moment."""

    a: Tensor
    b: Tensor
    base: nn.Module
    weight: WeightLoader
    scaling: float
    p: float
    """Share of the inputs dropped."""

    @property
    def scale(self) -> float:
        """What is kept of the inputs is scaled up: here, where it is a number."""
        return self.scaling / (1 - self.p)


def fuse_lora(model: nn.Module) -> None:
    """Let every plain LoRA module compute so. DoRA, and bases whose weight cannot be had, stay peft's."""
    for module in model.modules():
        weight = plain_weight(module)
        if weight is not None:
            _patch_forward(module, weight)


def _patch_forward(module: Any, weight: WeightLoader) -> None:
    original_forward, base = module.forward, module.get_base_layer()

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else active_adapter(self, base, weight)
        if adapter is None:
            return original_forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        output: Tensor = _FusedLoraLinear.apply(x, adapter.a, adapter.b, adapter)  # type: ignore[no-untyped-call]
        return output

    patch_forward(module, forward, "lora")


def active_adapter(module: Any, base: nn.Module, weight: WeightLoader) -> LoraParameters | None:
    """What ``module`` computes with at this moment; None where that is not one plain adapter."""
    names = module.active_adapters
    if module.disable_adapters or module.merged or len(names) != 1:
        return None
    (name,) = names
    return LoraParameters(
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        base,
        weight,
        module.scaling[name],
        getattr(module.lora_dropout[name], "p", 0.0) if module.training else 0.0,
    )


def plain_weight(module: Any) -> WeightLoader | None:
    """The frozen weight under a plain adapter; None where there is none, or it cannot be had."""
    if not hasattr(module, "lora_A") or getattr(module, "lora_variant", None):
        return None
    return _weight_of(module.get_base_layer())


def _weight_of(base: Any) -> WeightLoader | None:
    if type(base).__name__ != "Linear4bit":
        # Families have subclasses of their own (Falcon's); bitsandbytes' 8-bit weights are whole numbers.
        known = isinstance(base, nn.Linear) and base.weight.is_floating_point()
        return (lambda: base.weight) if known else None
    from bitsandbytes.functional import dequantize_4bit

    def dequantized() -> Tensor:
        packed = base.weight
        weight: Tensor = dequantize_4bit(packed.data.view(-1, 1), packed.quant_state)
        return weight

    return dequantized


class _FusedLoraLinear(torch.autograd.Function):
    """base(x) + scaling · dropout(x) · Aᵀ · Bᵀ for x (…, inputs), A (rank, inputs), B (outputs, rank)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, adapter: LoraParameters) -> Tensor:
        out, dropout_mask, xa = lora_forward(x, adapter)
        ctx.save_for_backward(x, dropout_mask, xa, a, b)
        ctx.adapter = adapter
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, dropout_mask, xa, a, b = ctx.saved_tensors
        needs_input_grad = ctx.needs_input_grad[0]
        return (
            *lora_backward(
                grad_outputs[0], x, dropout_mask, xa, a, b, ctx.adapter, needs_input_grad=needs_input_grad
            ),
            None,
        )


def lora_forward(x: Tensor, adapter: LoraParameters) -> tuple[Tensor, Tensor | None, Tensor]:
    """The outputs, what dropout kept of the inputs, and the inputs times A."""
    out: Tensor = adapter.base(x)
    device = x.device.type
    # Under autocast a norm's fp32 output goes in as it is, and the products are taken in half precision.
    under_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if under_autocast else x.dtype
    with _without_autocast(device, under_autocast):
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        dropout_mask = _dropout_mask(rows, adapter.p) if adapter.p else None
        xa = _apply_dropout(rows, dropout_mask) @ adapter.a.to(dtype).t()
        flat = out.view(-1, out.shape[-1])
        if out.dtype == dtype:
            flat.addmm_(xa, adapter.b.to(dtype).t(), alpha=adapter.scale)
        else:
            flat.add_(xa @ adapter.b.to(dtype).t(), alpha=adapter.scale)
    return out, dropout_mask, xa


def lora_backward(
    grad: Tensor,
    x: Tensor,
    dropout_mask: Tensor | None,
    xa: Tensor,
    a: Tensor,
    b: Tensor,
    adapter: LoraParameters,
    *,
    needs_input_grad: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the inputs (None where not wanted), of A and of B."""
    dtype = xa.dtype
    grad = grad.reshape(-1, b.shape[0]).to(dtype)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    grad_xa = (grad @ b.to(dtype)).mul_(adapter.scale)
    grad_b = (grad.t() @ xa).mul_(adapter.scale).to(b.dtype)
    grad_a = (grad_xa.t() @ _apply_dropout(rows, dropout_mask)).to(a.dtype)
    if not needs_input_grad:
        return None, grad_a, grad_b
    grad_x = grad @ adapter.weight().to(dtype)
    if dropout_mask is None:
        grad_x.addmm_(grad_xa, a.to(dtype))
    else:
        grad_x += _apply_dropout(grad_xa @ a.to(dtype), dropout_mask)
    return grad_x.view(x.shape).to(x.dtype), grad_a, grad_b


def _without_autocast(device: str, is_on: bool) -> Any:
    return torch.autocast(device, enabled=False) if is_on else nullcontext()


def _dropout_mask(values: Tensor, p: float) -> Tensor:
    """What is kept of ``values``, a byte an element: on a CPU all bits where it is, none where not.

    Drawing is a third of a step on a CPU where each element takes a 64-bit number; 15 bits decide as well.
    """
    if values.device.type != "cpu":
        return torch.empty_like(values, dtype=torch.bool).bernoulli_(1 - p)
    count = values.numel()
    drawn = torch.empty(-(-count // _WORDS), dtype=torch.int64, device=values.device)
    words = drawn.random_(-(1 << 63), None).view(torch.int16)[:count].bitwise_and_(_VALUES - 1)
    # Below zero, and so all ones once its sign is spread, where the word is not of the lowest share p.
    words.neg_().add_(round(p * _VALUES) - 1).bitwise_right_shift_(15)
    return words.to(torch.int8).view(values.shape)


def _apply_dropout(values: Tensor, dropout_mask: Tensor | None) -> Tensor:
    """Zeros where not kept. On a CPU as bits: arithmetic with another type is many times slower."""
    if dropout_mask is None:
        return values
    if dropout_mask.dtype == torch.bool:
        return values * dropout_mask
    bits = _BITS[values.dtype]
    return dropout_mask.to(bits).bitwise_and_(values.view(bits)).view(values.dtype)
