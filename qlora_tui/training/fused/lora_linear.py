"""A frozen linear module and its adapter as one autograd function, in place of peft's forward.

peft copies the base's output, casts the input of each target to the adapter's fp32, saves that copy (with
dropout another one), and multiplies in fp32. Here the input is saved as it is, so that targets that read the
same hidden state share it; dropout saves one byte per element; the products are in the compute dtype, as
under autocast; and the backward adds both gradients of the input in place.

Shapes of SmolLM2-135M's ``gate_proj`` at rank 16, for a packed sequence of 100 tokens::

    x     (1, 100, 576)     saved as it is, shared with up_proj
    A     (16, 576)         fp32, like B: small updates would vanish in 16 bits
    B     (1536, 16)
    xa    (100, 16)         (mask ⊙ x) · Aᵀ, saved: 16 numbers per token
    out   (1, 100, 1536)    x · Wᵀ, into which scale · xa · Bᵀ is added in place

    backward, for grad (100, 1536):
    grad_xa  (100, 16)      scale · grad · B
    grad_B   (1536, 16)     scale · gradᵀ · xa
    grad_A   (16, 576)      grad_xaᵀ · (mask ⊙ x)
    grad_x   (100, 576)     grad · W, into which grad_xa · A is added in place; W is dequantized for it

The mask is that of dropout, all ones without it. It is not rescaled: ``scale`` holds 1 / (1 - p). With
dropout grad_xa · A is masked first, and so not added in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qlora_tui.training.fused.adapter_casts import AdapterCasts

_WORDS = 4
"""Dropout decisions taken from one 64-bit random number."""
_VALUES = 1 << 15
"""Values of each decision: on a CPU a probability is exact to 1/32,768."""
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


WeightLoader: TypeAlias = Callable[[], Tensor]
"""Returns the frozen weight, (outputs, inputs), dequantized to 16 or 32 bits."""


@dataclass(frozen=True)
class LoraParameters:
    """The active adapter of one frozen module."""

    a: Tensor
    b: Tensor
    base: nn.Module
    weight: WeightLoader
    scaling: float
    p: float
    """Dropout probability."""
    casts: AdapterCasts

    def a_in(self, dtype: torch.dtype) -> Tensor:
        """A in the dtype of the products."""
        return self.casts.cast(self.a, dtype)

    def b_in(self, dtype: torch.dtype) -> Tensor:
        """B in the dtype of the products."""
        return self.casts.cast(self.b, dtype)

    @property
    def scale(self) -> float:
        """LoRA scaling, and the 1 / (1 - p) of dropout, which is cheaper here than on the inputs."""
        return self.scaling / (1 - self.p)


def active_adapter(
    module: Any, base: nn.Module, weight: WeightLoader, casts: AdapterCasts
) -> LoraParameters | None:
    """The active adapter of ``module``; None where it is not exactly one plain LoRA adapter."""
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
        casts,
    )


def plain_weight(module: Any) -> WeightLoader | None:
    """Access to the frozen weight under a plain adapter; None where there is none or it is not accessible."""
    if not hasattr(module, "lora_A") or getattr(module, "lora_variant", None):
        return None
    return _weight_of(module.get_base_layer())


def _weight_of(base: Any) -> WeightLoader | None:
    if type(base).__name__ != "Linear4bit":
        # Some families subclass nn.Linear (Falcon); bitsandbytes' 8-bit weights are integers.
        known = isinstance(base, nn.Linear) and base.weight.is_floating_point()
        return (lambda: base.weight) if known else None
    from bitsandbytes.functional import dequantize_4bit

    def dequantized() -> Tensor:
        packed = base.weight
        weight: Tensor = dequantize_4bit(packed.data.view(-1, 1), packed.quant_state)
        return weight

    return dequantized


class FusedLoraLinear(torch.autograd.Function):
    """base(x) + scaling · dropout(x) · Aᵀ · Bᵀ for x (…, inputs), A (rank, inputs), B (outputs, rank)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, adapter: LoraParameters) -> Tensor:
        out, dropout_mask, xa = lora_forward(x, adapter)
        ctx.save_for_backward(x, dropout_mask, xa)
        ctx.adapter = adapter
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, dropout_mask, xa = ctx.saved_tensors
        needs_input_grad = ctx.needs_input_grad[0]
        grads = lora_backward(
            grad_outputs[0], x, dropout_mask, xa, ctx.adapter, needs_input_grad=needs_input_grad
        )
        return *grads, None


def lora_forward(x: Tensor, adapter: LoraParameters) -> tuple[Tensor, Tensor | None, Tensor]:
    """The outputs (…, outputs), the dropout mask (None without dropout) and dropout(x) · Aᵀ (rows, rank)."""
    out: Tensor = adapter.base(x)
    dropout_mask, xa = adapter_inputs(x, adapter)
    add_adapter_outputs(out, xa, adapter)
    return out, dropout_mask, xa


def adapter_inputs(x: Tensor, adapter: LoraParameters) -> tuple[Tensor | None, Tensor]:
    """The dropout mask (None without dropout) and dropout(x) · Aᵀ, (rows, rank), of x (…, inputs)."""
    device = x.device.type
    dtype = product_dtype(x)
    with without_autocast(device):
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        dropout_mask = _dropout_mask(rows, adapter.p) if adapter.p else None
        return dropout_mask, apply_dropout(rows, dropout_mask) @ adapter.a_in(dtype).t()


def add_adapter_outputs(out: Tensor, xa: Tensor, adapter: LoraParameters) -> None:
    """Add scale · xa · Bᵀ in place to the outputs of the base, (…, outputs)."""
    device = out.device.type
    with without_autocast(device):
        flat, b = out.view(-1, out.shape[-1]), adapter.b_in(xa.dtype)
        if out.dtype == xa.dtype:
            flat.addmm_(xa, b.t(), alpha=adapter.scale)
        else:
            flat.add_(xa @ b.t(), alpha=adapter.scale)


def lora_backward(
    grad: Tensor,
    x: Tensor,
    dropout_mask: Tensor | None,
    xa: Tensor,
    adapter: LoraParameters,
    *,
    needs_input_grad: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x (None where not needed), of A and of B, in the shape and dtype of each."""
    grad, grad_xa, grad_b = grad_of_outputs(grad, xa, adapter)
    grad_a = grad_of_a(grad_xa, x, dropout_mask)
    grad_a, grad_b = cast_grads((grad_a, grad_b), adapter.a.dtype)
    if not needs_input_grad:
        return None, grad_a, grad_b
    grad_x = grad @ adapter.weight().to(grad.dtype)
    add_adapter_grad(grad_x, grad_xa, dropout_mask, adapter)
    return grad_x.view(x.shape).to(x.dtype), grad_a, grad_b


def grad_of_outputs(grad: Tensor, xa: Tensor, adapter: LoraParameters) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the outputs as (rows, outputs), and the gradients of ``xa`` and of B, in its dtype."""
    b, nothing = adapter.b_in(xa.dtype), xa.new_empty(())
    grad = grad.reshape(-1, b.shape[0]).to(xa.dtype)
    # The scale is a factor of the product itself, which needs no kernel of its own.
    grad_xa = torch.addmm(nothing, grad, b, beta=0, alpha=adapter.scale)
    grad_b = torch.addmm(nothing, grad.t(), xa, beta=0, alpha=adapter.scale)
    return grad, grad_xa, grad_b


def grad_of_a(grad_xa: Tensor, x: Tensor, dropout_mask: Tensor | None) -> Tensor:
    """The gradient of A, from the inputs x (…, inputs), in the dtype of ``grad_xa``."""
    rows = x.reshape(-1, x.shape[-1]).to(grad_xa.dtype)
    return grad_xa.t() @ apply_dropout(rows, dropout_mask)


def cast_grads(grads: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Gradients in the dtype of the adapter, cast by one kernel on a GPU."""
    if grads[0].dtype == dtype:
        return list(grads)
    cast = [torch.empty_like(grad, dtype=dtype) for grad in grads]
    torch._foreach_copy_(cast, list(grads))
    return cast


def add_adapter_grad(
    grad_x: Tensor, grad_xa: Tensor, dropout_mask: Tensor | None, adapter: LoraParameters
) -> None:
    """Add the adapter's part in place to the base's gradient of the inputs, (rows, inputs)."""
    a = adapter.a_in(grad_xa.dtype)
    if dropout_mask is None and grad_x.dtype == grad_xa.dtype:
        grad_x.addmm_(grad_xa, a)
    else:
        grad_x += apply_dropout(grad_xa @ a, dropout_mask)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context without autocast, which costs time where it is off already."""
    return torch.autocast(device, enabled=False) if _is_autocast(device) else nullcontext()


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the adapter's products. Under autocast x may be the fp32 output of a norm."""
    return torch.get_autocast_dtype(x.device.type) if _is_autocast(x.device.type) else x.dtype


def _dropout_mask(values: Tensor, p: float) -> Tensor:
    """A dropout mask of one byte per element: bool on a GPU; on a CPU int8, -1 to keep and 0 to drop.

    On a CPU one 64-bit random number decides for four elements, 15 bits each: with one number per element,
    drawing them would take a third of the step.
    """
    if values.device.type != "cpu":
        return torch.empty_like(values, dtype=torch.bool).bernoulli_(1 - p)
    count = values.numel()
    drawn = torch.empty(-(-count // _WORDS), dtype=torch.int64, device=values.device)
    words = drawn.random_(-(1 << 63), None).view(torch.int16)[:count].bitwise_and_(_VALUES - 1)
    # 15 random bits are below p · 32,768 for a share p of the elements. The others become negative here, and
    # the arithmetic shift spreads the sign bit: -1 (all bits set) to keep, 0 to drop.
    words.neg_().add_(round(p * _VALUES) - 1).bitwise_right_shift_(15)
    return words.to(torch.int8).view(values.shape)


def apply_dropout(values: Tensor, dropout_mask: Tensor | None) -> Tensor:
    """Zero the dropped elements. On a CPU by a bitwise and: mixed-dtype arithmetic is many times slower."""
    if dropout_mask is None:
        return values
    if dropout_mask.dtype == torch.bool:
        return values * dropout_mask
    bits = _BITS[values.dtype]
    return dropout_mask.to(bits).bitwise_and_(values.view(bits)).view(values.dtype)
