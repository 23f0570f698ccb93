"""The routed experts of a layer, in place of its MLP.

transformers 5 keeps the experts as two fused 3-D parameters and sorts the tokens by expert
(``integrations/moe.py``, ``grouped_mm_experts_forward``); before, each expert was a separate module and
processed its tokens in turn. Fused experts in 4 bits, or with adapters, are computed one at a time, as
``training/experts/routing.py`` does. Tokens are assumed to spread evenly over the experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.memory.autograd import Grads, Tensor
from qlora_tui.memory.linear import linear
from qlora_tui.memory.ops import FLOAT, Linear, Ops
from qlora_tui.memory.weights import BLOCK

INDEX = 8
"""Bytes of an index."""


@dataclass(frozen=True)
class Mixture:
    """The routed experts of one layer."""

    experts: int
    per_token: int
    hidden: int
    intermediate: int
    activation: str
    clamped: bool = False
    """Whether the experts follow gpt-oss: both halves clamped, a scaled sigmoid gate, and biases."""
    wide_weights: bool = False
    """Whether routing weights stay float32 (Mixtral, DeepSeek), and so do their products."""
    separate: bool = False
    """Whether each expert's matrices are separate modules (transformers 4)."""
    method: str = "none"
    """Quantization of separate experts."""
    expert_method: str = "none"
    """Quantization of fused experts."""
    ranks: tuple[int, ...] = ()
    """Ranks of the adapters on gate and up, and on down, of fused experts; 0 without."""


def mixture(ops: Ops, config: Mixture, x: Tensor) -> Tensor:
    """Replay the routed experts of the layer."""
    weights = _route(ops, config, x)
    if config.separate:
        return _in_turn(ops, config, x, weights)
    if config.expert_method != "none" or any(config.ranks):
        return _one_at_a_time(ops, config, x, weights)
    return _grouped(ops, config, x, weights)


def _route(ops: Ops, config: Mixture, x: Tensor) -> Tensor:
    """Replay router logits, their softmax in float32 (saved), and the chosen weights."""
    itemsize = x.itemsize
    logits = ops.new(ops.tokens * config.experts, itemsize)
    gradient = (x.numel, itemsize)
    logits.node = ops.tape.node((x,), lambda grad, saved: (ops.new(*gradient),), (None,))
    wide = ops.cast(logits, FLOAT)
    likely = ops.activation(wide, "tanh")  # softmax: saves its result
    del wide
    chosen = ops.apply(likely, numel=ops.tokens * config.per_token, itemsize=FLOAT)
    return chosen if config.wide_weights else ops.cast(chosen, itemsize)


def _grouped(ops: Ops, config: Mixture, x: Tensor, weights: Tensor) -> Tensor:
    slots = ops.tokens * config.per_token
    tokens, itemsize = ops.tokens, x.itemsize
    # The gathered rows, and gpt-oss's biases per row, stay bound to names until the function ends.
    gathered = ops.linear_map(x, slots * config.hidden)
    bias = ops.new(slots * 2 * config.intermediate, itemsize) if config.clamped else None
    both = ops.linear_map(gathered, slots * 2 * config.intermediate)
    inner = _clamped(ops, both, config) if config.clamped else _gate(ops, both, config)
    del both
    if bias:
        bias = ops.new(slots * config.hidden, itemsize)
    out = ops.linear_map(inner, slots * config.hidden)
    del inner
    out = weighted(ops, out, weights)
    out = ops.linear_map(out, slots * config.hidden)
    # The gradient of a sum is expanded, and materialized where it is used.
    total = ops.apply(out, numel=tokens * config.hidden, itemsize=out.itemsize)
    return ops.cast(total, itemsize)


def _gate(ops: Ops, both: Tensor, config: Mixture) -> Tensor:
    gate, up = ops.split(both, both.numel // 2, both.numel // 2)
    return ops.multiply(ops.activation(gate, config.activation), up)


def _clamped(ops: Ops, both: Tensor, config: Mixture) -> Tensor:
    """Replay gpt-oss's ``(clamp(up) + 1) * clamp(gate) * sigmoid(alpha * clamp(gate))``."""
    half = both.numel // 2
    gate = ops.activation(ops.slice(both, half), "clamp")
    up = ops.activation(ops.slice(both, half), "clamp")
    gated = ops.multiply(gate, ops.activation(ops.times_number(gate), "tanh"))
    del gate
    return ops.multiply(ops.times_number(up), gated)


def weighted(ops: Ops, x: Tensor, weights: Tensor) -> Tensor:
    """Replay the product with each slot's routing weight, which needs a gradient: saves expert outputs."""
    numel, rows, back = x.numel, weights.numel, x.itemsize
    itemsize = max(x.itemsize, weights.itemsize)

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        x_gradient = ops.new(numel, itemsize)
        spread = ops.new(numel, itemsize)
        if itemsize != back:
            # The engine casts one gradient before it sums the other over the row (validate_outputs); what the
            # function had unpacked is freed by then, unless the node holds it.
            saved.clear()
            x_gradient = ops.new(numel, back)
        del spread
        return (x_gradient, ops.new(rows, itemsize))

    return ops.apply(x, weights, numel=numel, itemsize=itemsize, backward=fn, save=(x, weights))


def _in_turn(ops: Ops, config: Mixture, x: Tensor, weights: Tensor) -> Tensor:
    """Replay the experts in turn: gather tokens, run the MLP, add into the sum in place."""
    rows = ops.tokens * config.per_token // config.experts
    hidden, inner = config.hidden, config.intermediate
    total = ops.new(x.numel, x.itemsize)
    itemsize = x.itemsize
    for expert in range(config.experts):
        state = ops.linear_map(x, rows * hidden)
        gated = ops.activation(_expert(ops, config, state, "w1", hidden, inner), config.activation)
        product = ops.multiply(gated, _expert(ops, config, state, "w3", hidden, inner))
        del gated, state
        out = _expert(ops, config, product, "w2", inner, hidden)
        del product
        part = ops.linear_map(weights, rows)
        out = weighted(ops, out, part)
        # index_add_ in place: the part's gradient is the selected rows of the sum's.
        joined = ops.tape.node(
            (total if expert else None, out), lambda grad, saved: (grad, ops.new(rows * hidden, itemsize))
        )
        total = total.view(joined)
        del out, part
    return total


def _expert(ops: Ops, config: Mixture, x: Tensor, name: str, inputs: int, outputs: int) -> Tensor:
    method = config.method if config.method in ("nf4", "fp4", "int8") else "none"
    return linear(ops, x, Linear(name, inputs, outputs, method))  # type: ignore[arg-type]  # a Linear module


def _one_at_a_time(ops: Ops, config: Mixture, x: Tensor, weights: Tensor) -> Tensor:
    """Replay our function for hidden states x and the routing weights of all slots."""
    loop = _Loop(ops, config, x, weights)
    order = ops.new(loop.slots, INDEX)
    sorted_experts = ops.new(loop.slots, INDEX)
    del sorted_experts
    tokens, counts = ops.new(loop.slots, INDEX), ops.new(config.experts, INDEX)
    total = ops.new(x.numel, FLOAT)
    both = loop.new(loop.slots * 2 * config.intermediate)
    memory = loop.matrix_memory()
    loop.forward_of_one()
    del memory
    out = ops.new(x.numel, x.itemsize)
    del total
    leaves = [leaf for rank in config.ranks if rank for leaf in ops.adapter_leaves(x)]
    out.node = ops.tape.node((x, weights, *leaves), loop.backward, (x, weights, both, order, tokens, counts))
    return out


@dataclass(frozen=True)
class _Projection:
    """A matrix of each expert, with the rank of its adapter."""

    inputs: int
    outputs: int
    rank: int


class _Loop:
    """Sizes of one layer's experts, and what our function allocates for one of them."""

    def __init__(self, ops: Ops, config: Mixture, x: Tensor, weights: Tensor) -> None:
        self._ops, self._config = ops, config
        self.slots = ops.tokens * config.per_token
        self._rows = -(-self.slots // config.experts)
        self._itemsize = ops.compute if ops.autocast else x.itemsize
        self._numel, self._entered = x.numel, x.itemsize
        self._weights_itemsize = weights.itemsize
        ranks = config.ranks or (0, 0)
        self._up = _Projection(config.hidden, 2 * config.intermediate, ranks[0])
        self._down = _Projection(config.intermediate, config.hidden, ranks[1])

    def new(self, numel: int, item: str | None = None) -> Tensor:
        """Allocate a tensor in the dtype of the products."""
        return self._ops.new(numel, self._itemsize, item)

    def matrix_memory(self) -> Tensor | None:
        """Allocate the memory for a dequantized matrix, which all share on a GPU."""
        if self._config.expert_method == "none" or self._ops.device == "cpu":
            return None
        return self.new(max(each.inputs * each.outputs for each in (self._up, self._down)), "dequantized")

    def forward_of_one(self) -> None:
        """Replay the forward of one expert."""
        gathered = self.new(self._rows * self._config.hidden)
        projected = self._product(self._up, self._up.outputs)
        del gathered
        inner = self._gate()
        del projected
        out = self._product(self._down, self._down.outputs)
        wide = self._ops.new(out.numel, FLOAT)
        del out, inner, wide

    def backward(self, grad: Tensor, saved: list[Tensor | None]) -> Grads:
        """Replay the backward of all experts."""
        ops = self._ops
        weights = ops.new(self.slots, FLOAT)
        grad_x, grad_weights = ops.new(self._numel, FLOAT), ops.new(self.slots, FLOAT)
        factors = [
            ops.new(self._config.experts * each.rank * width, FLOAT, "gradients")
            for each in (self._up, self._down)
            if each.rank
            for width in (each.inputs, each.outputs)
        ]
        memory = self.matrix_memory()
        self._backward_of_one()
        del memory
        out = ops.new(self._numel, self._entered) if self._entered != FLOAT else grad_x
        del grad_x, weights
        if self._weights_itemsize != FLOAT:
            grad_weights = ops.new(self.slots, self._weights_itemsize)
        return (out, grad_weights, *factors)

    def _backward_of_one(self) -> None:
        inner_numel, numel = self._rows * self._config.intermediate, self._rows * self._config.hidden
        grad_out = self.new(numel)
        unit = self._product(self._down, self._down.inputs)
        activated, inner = self.new(inner_numel), self.new(inner_numel)
        product = self.new(inner_numel)
        del product
        if self._down.rank:
            weighted = self.new(numel)
            self._factor_gradients(self._down)
            del weighted
        del grad_out
        grad_gate, grad_up = self.new(inner_numel), self.new(inner_numel)
        del activated
        grad_both = self.new(2 * inner_numel)
        del grad_gate, grad_up, inner, unit
        if self._up.rank:
            gathered = self.new(numel)
            self._factor_gradients(self._up)
            del gathered
        grad_x = self._product(self._up, self._up.inputs)
        wide = self._ops.new(numel, FLOAT)
        del wide, grad_x, grad_both

    def _product(self, projection: _Projection, width: int) -> Tensor:
        """Replay the product of an expert's rows with a matrix, or of their gradients with it, and with its
        adapter. A matrix is dequantized from its scales, on a CPU in memory of its own."""
        scales = matrix = None
        if self._config.expert_method != "none":
            weights = projection.inputs * projection.outputs
            scales = self._ops.new(-(-weights // BLOCK), FLOAT, "dequantized")
            matrix = self.new(weights, "dequantized") if self._ops.device == "cpu" else None
        out = self.new(self._rows * width)
        del scales, matrix
        if projection.rank:
            factors = self._factors(projection, "adapter_inputs")
            del factors
        return out

    def _factors(self, projection: _Projection, item: str) -> list[Tensor]:
        """Replay tensors of the sizes of A, B and the inputs times A of one expert."""
        widths = (projection.inputs, projection.outputs, self._rows)
        return [self.new(projection.rank * width, item) for width in widths]

    def _factor_gradients(self, projection: _Projection) -> None:
        """Replay the gradients of an expert's factors, which are then written into those of all experts."""
        gradients = self._factors(projection, "gradients")
        of_factor = self.new(projection.rank * max(projection.inputs, projection.outputs), "gradients")
        del gradients, of_factor

    def _gate(self) -> Tensor:
        """Replay the activation of an expert's rows."""
        activated, inner = (self.new(self._rows * self._config.intermediate) for _ in range(2))
        del activated
        return inner
