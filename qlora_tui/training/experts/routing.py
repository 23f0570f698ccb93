"""The routed experts of a layer as one autograd function that holds one expert's weights at a time.

A token's hidden state goes to ``per_token`` experts; each pair of a token and one of its experts is a slot.
Slots are sorted by expert, and the experts are computed one after another, forward and backward. Memory holds
one expert at a time: its two matrices, dequantized in turn into the same buffer, and the rows of its tokens.

Shapes of Qwen3-30B-A3B for a packed sequence of 4,096 tokens with 8 experts each, so 32,768 slots::

    x         (4096, 2048)    saved: the layer's own hidden state
    weights   (4096, 8)       saved: the routing weights
    both      (32768, 1536)   gate and up projections of each slot, saved
    matrix    (1536, 2048)    one expert's weights, in memory that all experts reuse
    total     (4096, 2048)    float32: the weighted outputs, added expert by expert

    backward of an expert with n slots, for grad (n, 2048), the gradient of its tokens' outputs:
    u         (n, 768)        grad · W_down: the gradient of the down projection's input for a weight of 1
    weights   (n,)            the row sums of u ⊙ that input, so that no expert's output is saved
    both      (n, 1536)       u ⊙ weights, backpropagated through the gate
    x         (n, 2048)       both · W_gate_up, added to float32 sums

LoRA adds scale · x · Aᵀ · Bᵀ to each product, with the A (rank, inputs) and B (outputs, rank) of the expert.
The gradients of A and B are written expert by expert; those of experts without tokens are 0.

The expert classes of transformers share an interface (``use_experts_implementation`` in
``integrations/moe.py``): ``gate_up_proj`` and ``down_proj`` are parameters of three dimensions, biases have
the suffix ``_bias``, and ``_apply_gate`` is the activation between them. bitsandbytes quantizes none of
these, because they are not linear modules. :class:`Experts4bit` holds the same weights under the same names,
packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qlora_tui.training.experts.storage import PACKED, ExpertLayout, dequantize
from qlora_tui.training.fused.lora import product_dtype, without_autocast

MatrixReader: TypeAlias = Callable[[int, torch.dtype, Tensor | None], Tensor]
"""Returns an expert's matrix in its stored orientation, in a given dtype and perhaps in a given buffer."""


@dataclass(frozen=True)
class ExpertAdapter:
    """The LoRA factors of one projection, as peft's ``ParamWrapper`` stacks them."""

    a: Tensor
    """(experts · rank, inputs); the rows of an expert are contiguous."""
    b: Tensor
    """(outputs, rank · experts); the columns of an expert are ``experts`` apart."""
    scaling: float
    experts: int

    def a_of(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Return A of one expert, (rank, inputs)."""
        return rows_of_a(self.a, self.experts)[expert].to(dtype)

    def b_of(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Return B of one expert, (outputs, rank)."""
        return columns_of_b(self.b, self.experts)[expert].to(dtype).contiguous()


def rows_of_a(a: Tensor, experts: int) -> Tensor:
    """Return a view (experts, rank, inputs) of stacked factors A."""
    return a.view(experts, -1, a.shape[1])


def columns_of_b(b: Tensor, experts: int) -> Tensor:
    """Return a view (experts, outputs, rank) of stacked factors B."""
    return b.view(b.shape[0], -1, experts).permute(2, 0, 1)


@dataclass(frozen=True)
class Projection:
    """One projection of all experts: frozen weights and biases, and an optional adapter."""

    read: MatrixReader
    transposed: bool
    """Whether a matrix is stored as (inputs, outputs), as in gpt-oss."""
    inputs: int
    outputs: int
    bias: Tensor | None = None
    """(experts, outputs)."""
    adapter: ExpertAdapter | None = None

    def product(self, x: Tensor, expert: int, memory: Tensor | None) -> Tensor:
        """Return the outputs (n, outputs) of an expert for inputs (n, inputs)."""
        matrix = self.read(expert, x.dtype, memory)
        out = x @ (matrix if self.transposed else matrix.t())
        if self.bias is not None:
            out += self.bias[expert].to(out.dtype)
        if self.adapter is not None:
            xa = x @ self.adapter.a_of(expert, x.dtype).t()
            out.addmm_(xa, self.adapter.b_of(expert, x.dtype).t(), alpha=self.adapter.scaling)
        return out

    def input_gradient(self, grad: Tensor, expert: int, memory: Tensor | None) -> Tensor:
        """Return the gradient (n, inputs) of an expert's inputs, given that of its outputs (n, outputs)."""
        matrix = self.read(expert, grad.dtype, memory)
        out = grad @ (matrix.t() if self.transposed else matrix)
        if self.adapter is not None:
            grad_xa = grad @ self.adapter.b_of(expert, grad.dtype)
            out.addmm_(grad_xa, self.adapter.a_of(expert, grad.dtype), alpha=self.adapter.scaling)
        return out


@dataclass(frozen=True)
class Routes:
    """The experts of each token, as slots sorted by expert."""

    order: Tensor
    """(slots,): the number of each sorted slot, token · per_token + position among the token's experts."""
    tokens: Tensor
    """(slots,): the token of each slot in sorted order."""
    counts: Tensor
    """(experts,): the number of slots of each expert."""

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has slots, with the range of its slots. Waits for the GPU once.

        On the meta device, where counts have no values, all experts count as having the same number of slots.
        Only the first two are yielded, because each other expert would allocate and free the same memory.
        """
        start = 0
        if self.counts.device.type == "meta":
            counts = [-(-len(self.order) // len(self.counts))] * 2
        else:
            counts = self.counts.tolist()
        for expert, count in enumerate(counts):
            if count:
                yield expert, slice(start, start + count)
            start += count


def sort_by_expert(chosen: Tensor, experts: int) -> Routes:
    """Sort the slots of ``chosen``, the experts (tokens, per_token) of each token."""
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    if chosen.device.type == "meta":
        counts = flat.new_empty(experts)
    else:
        counts = torch.bincount(flat, minlength=experts)
    return Routes(order, order.div(chosen.shape[-1], rounding_mode="floor"), counts)


@dataclass(frozen=True)
class RoutedLayer:
    """The computation of the experts of one layer."""

    first: Projection
    """Gate and up projections."""
    second: Projection
    """Down projection."""
    gate: Callable[[Tensor], Tensor]
    """The activation, from (n, first.outputs) to (n, second.inputs)."""
    experts: int

    is_packed: bool = True
    """Whether matrices must be dequantized to be read."""

    @property
    def factors(self) -> list[Tensor | None]:
        """Return A and B of both projections; None for a projection without an adapter."""
        adapters = (self.first.adapter, self.second.adapter)
        return [factor for each in adapters for factor in ((each.a, each.b) if each else (None, None))]

    def memory(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return a buffer for one matrix. None on a CPU, where bitsandbytes allocates each matrix, and for
        matrices that need no dequantization.
        """
        if x.device.type == "cpu" or not self.is_packed:
            return None
        numel = max(each.inputs * each.outputs for each in (self.first, self.second))
        return torch.empty(numel, dtype=dtype, device=x.device)


def routed_experts(x: Tensor, chosen: Tensor, weights: Tensor, layer: RoutedLayer) -> Tensor:
    """Return the weighted sum (tokens, hidden) of the outputs of each token's experts, in the dtype of ``x``.

    Args:
        x: hidden states (tokens, hidden).
        chosen: experts (tokens, per_token), each at most once per token.
        weights: routing weights (tokens, per_token), of any floating-point dtype.
    """
    arguments = (x, weights, *layer.factors, sort_by_expert(chosen, layer.experts), layer)
    out: Tensor = RoutedExperts.apply(*arguments)  # type: ignore[no-untyped-call]  # torch's own
    return out


class RoutedExperts(torch.autograd.Function):
    """Autograd function from x (tokens, hidden) and routing weights to the outputs (tokens, hidden)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        routes: Routes,
        layer: RoutedLayer,
    ) -> Tensor:
        dtype = product_dtype(x)
        with without_autocast(x.device.type):
            total, both = _forward(x, weights, routes, layer, dtype, keeps_both=any(ctx.needs_input_grad))
        # Save the counts too: if two experts are nearly equally likely, a recomputed layer may choose the
        # other.
        ctx.save_for_backward(x, weights, both, routes.order, routes.tokens, routes.counts)
        ctx.layer, ctx.dtype = layer, dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, both, *routes = ctx.saved_tensors
        with without_autocast(x.device.type):
            grads = _Backward(x, weights, both, Routes(*routes), ctx.layer, ctx.dtype, ctx.needs_input_grad)
            return grads.compute(grad_outputs[0])


def _forward(
    x: Tensor, weights: Tensor, routes: Routes, layer: RoutedLayer, dtype: torch.dtype, *, keeps_both: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the weighted sums, and the gate and up projections of all slots if they must be saved."""
    rows = x.to(dtype)
    by_slot = weights.reshape(-1)
    slots = routes.order.numel()
    both = rows.new_empty(slots, layer.first.outputs) if keeps_both else None
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    memory = layer.memory(x, dtype)
    for expert, span in routes.spans():
        tokens = routes.tokens[span]
        projected = layer.first.product(rows[tokens], expert, memory)
        if both is not None:
            both[span] = projected
        inner = layer.gate(projected)
        del projected
        out = layer.second.product(inner, expert, memory).float()
        del inner
        # Each token goes to an expert at most once, so no call adds to a row twice, and the order is fixed.
        total.index_add_(0, tokens, out.mul_(by_slot[routes.order[span]].float()[:, None]))
        del out
    del memory, rows
    return total.to(x.dtype), both


class _Backward:
    """The gradients of one call, accumulated expert by expert."""

    def __init__(
        self,
        x: Tensor,
        weights: Tensor,
        both: Tensor,
        routes: Routes,
        layer: RoutedLayer,
        dtype: torch.dtype,
        needed: tuple[bool, ...],
    ) -> None:
        self._rows, self._weights, self._both = x.to(dtype), weights.reshape(-1).float(), both
        self._routes, self._layer = routes, layer
        self._x_dtype, self._weights_dtype, self._weights_shape = x.dtype, weights.dtype, weights.shape
        needs_x, needs_weights = needed[:2]
        device = x.device
        self._grad_x = torch.zeros(x.shape, dtype=torch.float32, device=device) if needs_x else None
        self._grad_weights = torch.zeros_like(self._weights) if needs_weights else None
        self._factors = [
            None if factor is None or not needs else torch.zeros_like(factor)
            for factor, needs in zip(layer.factors, needed[2:6], strict=True)
        ]
        self._memory = layer.memory(x, dtype)

    def compute(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the function's arguments, given its output's gradient (tokens, hidden)."""
        grad = grad.to(self._rows.dtype)
        for expert, span in self._routes.spans():
            self._add_expert(expert, span, grad)
        self._memory = None
        grad_x = None if self._grad_x is None else self._grad_x.to(self._x_dtype)
        grad_weights = (
            None
            if self._grad_weights is None
            else self._grad_weights.to(self._weights_dtype).view(self._weights_shape)
        )
        return grad_x, grad_weights, *self._factors, None, None

    def _add_expert(self, expert: int, span: slice, grad: Tensor) -> None:
        first, second = self._layer.first, self._layer.second
        tokens, slots = self._routes.tokens[span], self._routes.order[span]
        weights = self._weights[slots][:, None]
        grad_out = grad[tokens]
        unit = second.input_gradient(grad_out, expert, self._memory)
        with torch.enable_grad():
            projected = self._both[span].detach().requires_grad_()
            inner = self._layer.gate(projected)
        if self._grad_weights is not None:
            each = (unit * inner.detach()).sum(-1, dtype=torch.float32)
            if second.bias is not None:
                each += grad_out.float() @ second.bias[expert].float()
            self._grad_weights[slots] = each
        if self._factors[2] is not None:
            self._add_factors(2, expert, grad_out * weights.to(grad_out.dtype), inner.detach())
        del grad_out
        (grad_both,) = torch.autograd.grad(inner, projected, unit.mul_(weights.to(unit.dtype)))
        del inner, projected, unit
        if self._factors[0] is not None:
            self._add_factors(0, expert, grad_both, self._rows[tokens])
        if self._grad_x is not None:
            self._grad_x.index_add_(0, tokens, first.input_gradient(grad_both, expert, self._memory).float())

    def _add_factors(self, at: int, expert: int, grad: Tensor, x: Tensor) -> None:
        """Write the gradients of an expert's A and B, given its inputs and the gradient of its outputs."""
        projection = self._layer.second if at else self._layer.first
        adapter, grad_a, grad_b = projection.adapter, self._factors[at], self._factors[at + 1]
        assert adapter is not None and grad_a is not None and grad_b is not None
        a, b = adapter.a_of(expert, x.dtype), adapter.b_of(expert, x.dtype)
        rows_of_a(grad_a, adapter.experts)[expert] = (grad @ b).mul_(adapter.scaling).t() @ x
        columns_of_b(grad_b, adapter.experts)[expert] = (grad.t() @ (x @ a.t())).mul_(adapter.scaling)


PROJECTIONS = ("gate_up_proj", "down_proj")
"""Names of the two parameters, in the order of computation."""
_KINDS = 3


class Experts4bit(nn.Module):
    """Experts whose two projections are stacks of 4-bit matrices.

    Every tensor is a parameter or a buffer of this module: ``gate_up_proj`` and ``down_proj``, (experts,
    bytes) of uint8, their scales with suffixes (:mod:`.storage`), and the family's biases if any.
    """

    def __init__(self, family: Any, method: str, *, nested: bool) -> None:
        """Take shapes and activation from ``family``, the module to replace; the weights are set later.

        Args:
            family: a module for which :func:`is_fused_experts` is true, on any device.
            method: ``nf4`` or ``fp4``.
            nested: whether scales are quantized too.
        """
        super().__init__()
        self.num_experts = int(family.gate_up_proj.shape[0])
        self.is_transposed = bool(family.is_transposed)
        self._layouts = {}
        for name in PROJECTIONS:
            experts, rows, columns = getattr(family, name).shape
            self._layouts[name] = ExpertLayout(experts, rows, columns, method, nested)
        for name, layout in self._layouts.items():
            for suffix, tensor in layout.empty_tensors(getattr(family, name).device).items():
                if suffix == PACKED:
                    self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
                else:
                    self.register_buffer(name + suffix, tensor)
            if family.has_bias:
                self.register_parameter(f"{name}_bias", getattr(family, f"{name}_bias"))
        # The family's own function, which reads activation and limits from the family module. That module is
        # not registered as a submodule of this one, because its parameters have the same names.
        self._family = [_without_parameters(family)]

    def layout(self, name: str) -> ExpertLayout:
        """Return shape and quantization of ``gate_up_proj`` or ``down_proj``."""
        return self._layouts[name]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a projection, keyed by suffix."""
        return {suffix: getattr(self, name + suffix) for suffix in self._layouts[name].suffixes}

    def matrix(self, name: str, expert: int, dtype: torch.dtype, memory: Tensor | None = None) -> Tensor:
        """Return one expert's dequantized matrix of a projection, (rows, columns) as the family stores it."""
        return dequantize(self.tensors(name), expert, self._layouts[name], dtype, memory)

    def _apply_gate(self, both: Tensor) -> Tensor:
        """Apply the activation to gate and up projections: (n, 2 · width) to (n, width).

        The family's code calls this method by this name.
        """
        out: Tensor = self._family[0]._apply_gate(both)
        return out

    @property
    def family(self) -> Any:
        """Return the module that this one replaces, without weights."""
        return self._family[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sums (tokens, hidden) of the experts of each token."""
        return routed_experts(hidden_states, top_k_index, top_k_weights, routed_layer(self))


def routed_layer(experts: Any, adapters: Mapping[str, ExpertAdapter] | None = None) -> RoutedLayer:
    """Return the computation of a layer's experts, for 4-bit experts and for a family's own module.

    ``adapters`` has the adapter of each adapted projection, keyed by the projection's name.
    """
    first, second = (_projection(experts, name, (adapters or {}).get(name)) for name in PROJECTIONS)
    is_packed = isinstance(experts, Experts4bit)
    return RoutedLayer(first, second, experts._apply_gate, int(experts.num_experts), is_packed)


def _projection(experts: Any, name: str, adapter: ExpertAdapter | None) -> Projection:
    read: MatrixReader
    if isinstance(experts, Experts4bit):
        layout = experts.layout(name)
        rows, columns, read = layout.rows, layout.columns, partial(experts.matrix, name)
    else:
        _, rows, columns = getattr(experts, name).shape
        read = partial(_stored_matrix, experts, name)
    transposed = bool(experts.is_transposed)
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    return Projection(read, transposed, inputs, outputs, getattr(experts, f"{name}_bias", None), adapter)


def _stored_matrix(
    experts: nn.Module, name: str, expert: int, dtype: torch.dtype, memory: Tensor | None = None
) -> Tensor:
    stored: Tensor = getattr(experts, name)[expert]
    return stored.to(dtype)


def is_fused_experts(module: nn.Module) -> bool:
    """Return whether a module has gated experts in two fused float parameters, and no norm after them."""
    return (
        hasattr(module, "is_transposed")
        and getattr(module, "has_gate", False)
        and not getattr(module, "has_post_expert_norm", False)
        and all(
            isinstance(parameter := module._parameters.get(name), nn.Parameter)
            and parameter.dim() == _KINDS
            and parameter.is_floating_point()
            for name in PROJECTIONS
        )
    )


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and module of each module with fused experts in 16 or 32 bits."""
    return ((name, module) for name, module in model.named_modules() if is_fused_experts(module))


def experts_4bit(model: nn.Module) -> Iterator[tuple[str, Experts4bit]]:
    """Yield the name and module of each 4-bit experts module."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Experts4bit))


def replace_experts(model: nn.Module, method: str, *, nested: bool) -> None:
    """Replace every module of fused experts with one for 4-bit weights, whose values are not yet set."""
    for name, module in list(fused_experts(model)):
        model.set_submodule(name, Experts4bit(module, method, nested=nested))


def _without_parameters(family: Any) -> Any:
    """Return a shallow copy of a module with its settings and submodules but without its parameters."""
    copy = object.__new__(type(family))
    copy.__dict__.update({**family.__dict__, "_parameters": {}, "_buffers": dict(family._buffers)})
    return copy
