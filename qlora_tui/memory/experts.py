"""The routed experts of a layer, as the estimate replays them.

Fused experts computed one at a time, as ``training/experts/routed_function.py`` does.

The rows of one expert are replayed, as each frees its own before the next. Tokens are assumed to spread
evenly over the experts.

A mixture of experts instead of the MLP.

transformers 5 keeps the experts as two fused 3-D parameters and sorts the tokens by expert
(``integrations/moe.py``, ``grouped_mm_experts_forward``); before, each expert was a separate module and
processed its tokens in turn. Fused experts in 4 bits, or with adapters, are in :mod:`.expert_loop`. Tokens
are assumed to spread evenly over the experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.memory.autograd import Grads, Tensor
from qlora_tui.memory.linear import linear
from qlora_tui.memory.ops import FLOAT, Linear, Ops
from qlora_tui.memory.weights import BLOCK


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
    biased: bool = False
    """Whether fused experts have biases."""
    ranks: tuple[int, ...] = ()
    """Ranks of the adapters on gate and up, and on down, of fused experts; 0 without."""

    @property
    def one_at_a_time(self) -> bool:
        """Whether our own function computes them."""
        return self.expert_method != "none" or any(self.ranks)


INDEX = 8
"""Bytes of an index."""


def routed_experts(ops: Ops, config: Mixture, x: Tensor, weights: Tensor) -> Tensor:
    """Replay the function for hidden states x and the routing weights of all slots."""
    loop = _Loop(ops, config, x, weights)
    order = ops.new(loop.slots, INDEX)
    sorted_experts = ops.new(loop.slots, INDEX)
    del sorted_experts
    tokens, counts = ops.new(loop.slots, INDEX), ops.new(config.experts, INDEX)
    total = ops.new(x.numel, FLOAT)
    both = ops.new(loop.slots * loop.both_width, loop.itemsize)
    memory = loop.memory()
    loop.forward_of_one(memory)
    del memory
    out = ops.new(x.numel, x.itemsize)
    del total
    leaves = [leaf for rank in config.ranks if rank for leaf in ops.adapter_leaves(x)]
    out.node = ops.tape.node((x, weights, *leaves), loop.backward, (x, weights, both, order, tokens, counts))
    return out


class _Loop:
    """Sizes of one layer's experts, and what their function allocates."""

    def __init__(self, ops: Ops, config: Mixture, x: Tensor, weights: Tensor) -> None:
        self._ops, self._config = ops, config
        self.slots = ops.tokens * config.per_token
        self.rows = -(-self.slots // config.experts)
        self.both_width = 2 * config.intermediate
        self.itemsize = ops.compute if ops.autocast else x.itemsize
        self._numel, self._entered = x.numel, x.itemsize
        self._weights_itemsize = weights.itemsize
        ranks = config.ranks or (0, 0)
        self._projections = (
            (config.hidden, self.both_width, ranks[0]),
            (config.intermediate, config.hidden, ranks[1]),
        )
        """Inputs, outputs and rank of each projection."""

    def memory(self) -> Tensor | None:
        """Memory for one dequantized matrix, which all share on a GPU."""
        if self._config.expert_method == "none" or self._ops.device == "cpu":
            return None
        with self._ops.meter.attribute_to("dequantized"):
            return self._ops.new(max(i * o for i, o, _ in self._projections), self.itemsize)

    def forward_of_one(self, memory: Tensor | None) -> None:
        """Replay the forward of one expert."""
        ops, rows = self._ops, self.rows
        gathered = ops.new(rows * self._config.hidden, self.itemsize)
        projected = self._product(0, rows)
        del gathered
        inner = self._gate()
        del projected
        out = self._product(1, rows)
        wide = ops.new(out.numel, FLOAT)
        del out, inner, wide

    def backward(self, grad: Tensor, saved: list[Tensor | None]) -> Grads:
        """Replay the backward of all experts."""
        ops, config = self._ops, self._config
        weights = ops.new(self.slots, FLOAT)
        grad_x, grad_weights = ops.new(self._numel, FLOAT), ops.new(self.slots, FLOAT)
        with ops.meter.attribute_to("gradients"):
            factors = [
                ops.new(config.experts * rank * width, ops.adapter)
                for inputs, outputs, rank in self._projections
                if rank
                for width in (inputs, outputs)
            ]
        memory = self.memory()
        self._backward_of_one()
        del memory
        out = ops.new(self._numel, self._entered) if self._entered != FLOAT else grad_x
        del grad_x, weights
        if self._weights_itemsize != FLOAT:
            grad_weights = ops.new(self.slots, self._weights_itemsize)
        return (out, grad_weights, *factors)

    def _backward_of_one(self) -> None:
        ops, rows, itemsize = self._ops, self.rows, self.itemsize
        inner_numel = rows * self._config.intermediate
        grad_out = ops.new(rows * self._config.hidden, itemsize)
        unit = self._input_gradient(1, rows)
        activated, inner = ops.new(inner_numel, itemsize), ops.new(inner_numel, itemsize)
        product = ops.new(inner_numel, itemsize)
        del product
        if self._projections[1][2]:
            weighted = ops.new(grad_out.numel, itemsize)
            self._factor_gradients(1, rows)
            del weighted
        del grad_out
        grad_gate, grad_up = ops.new(inner_numel, itemsize), ops.new(inner_numel, itemsize)
        del activated
        grad_both = ops.new(2 * inner_numel, itemsize)
        del grad_gate, grad_up, inner, unit
        if self._projections[0][2]:
            gathered = ops.new(rows * self._config.hidden, itemsize)
            self._factor_gradients(0, rows)
            del gathered
        grad_x = self._input_gradient(0, rows)
        wide = ops.new(grad_x.numel, FLOAT)
        del wide, grad_x, grad_both

    def _product(self, at: int, rows: int) -> Tensor:
        """Replay the outputs of one projection of an expert."""
        _, outputs, rank = self._projections[at]
        scales, matrix = self._matrix(at)
        out = self._ops.new(rows * outputs, self.itemsize)
        del scales, matrix
        self._adapter(at, rows, rank)
        return out

    def _input_gradient(self, at: int, rows: int) -> Tensor:
        """Replay the gradient of the inputs of one projection of an expert."""
        inputs, _, rank = self._projections[at]
        scales, matrix = self._matrix(at)
        out = self._ops.new(rows * inputs, self.itemsize)
        del scales, matrix
        self._adapter(at, rows, rank)
        return out

    def _matrix(self, at: int) -> tuple[Tensor | None, Tensor | None]:
        """Replay dequantizing a matrix: its scales, then on a CPU the matrix."""
        if self._config.expert_method == "none":
            return None, None
        inputs, outputs, _ = self._projections[at]
        with self._ops.meter.attribute_to("dequantized"):
            scales = self._ops.new(-(-inputs * outputs // BLOCK), FLOAT)
            on_cpu = self._ops.device == "cpu"
            return scales, self._ops.new(inputs * outputs, self.itemsize) if on_cpu else None

    def _adapter(self, at: int, rows: int, rank: int) -> None:
        """Replay adding an adapter's part to a product."""
        if not rank:
            return
        inputs, outputs, _ = self._projections[at]
        with self._ops.meter.attribute_to("adapter_inputs"):
            a, b = self._ops.new(rank * inputs, self.itemsize), self._ops.new(rank * outputs, self.itemsize)
            thin = self._ops.new(rows * rank, self.itemsize)
        del a, b, thin

    def _factor_gradients(self, at: int, rows: int) -> None:
        """Replay the gradients of an expert's factors, which are then written into those of all experts."""
        inputs, outputs, rank = self._projections[at]
        with self._ops.meter.attribute_to("gradients"):
            a, b = self._ops.new(rank * inputs, self.itemsize), self._ops.new(rank * outputs, self.itemsize)
            thin = self._ops.new(rows * rank, self.itemsize)
            of_factor = self._ops.new(rank * max(inputs, outputs), self.itemsize)
        del a, b, thin, of_factor

    def _gate(self) -> Tensor:
        """Replay the activation of an expert's rows."""
        ops, numel = self._ops, self.rows * self._config.intermediate
        activated = ops.new(numel, self.itemsize)
        inner = ops.new(numel, self.itemsize)
        del activated
        return inner


def mixture(ops: Ops, config: Mixture, x: Tensor) -> Tensor:
    """Replay the routed experts of the layer."""
    weights = _route(ops, config, x)
    if config.separate:
        return _in_turn(ops, config, x, weights)
    if config.one_at_a_time:
        return routed_experts(ops, config, x, weights)
    return _grouped(ops, config, x, weights)


def _route(ops: Ops, config: Mixture, x: Tensor) -> Tensor:
    """Replay router logits, their softmax in float32 (saved), and the chosen weights."""
    tokens, numel, itemsize = ops.tokens, x.numel, x.itemsize
    logits = ops.new(tokens * config.experts, itemsize)
    logits.node = ops.tape.node((x,), lambda grad, saved: (ops.new(numel, itemsize),), (None,))
    wide = ops.cast(logits, FLOAT)
    likely = ops.activation(wide, "tanh")  # softmax: saves its result
    del wide
    every = tokens * config.experts
    node = ops.tape.node((likely,), lambda grad, saved: (ops.new(every, FLOAT),))
    chosen = ops.new(tokens * config.per_token, FLOAT)
    chosen.node = node
    return chosen if config.wide_weights else ops.cast(chosen, itemsize)


def _grouped(ops: Ops, config: Mixture, x: Tensor, weights: Tensor) -> Tensor:
    slots = ops.tokens * config.per_token
    tokens, itemsize = ops.tokens, x.itemsize
    # The gathered rows, and gpt-oss's biases per row, stay bound to names until the function ends.
    gathered = _index(ops, x, slots * config.hidden)
    bias = ops.new(slots * 2 * config.intermediate, itemsize) if config.clamped else None
    both = _product(ops, gathered, slots, config.hidden, 2 * config.intermediate)
    inner = _clamped(ops, both, config) if config.clamped else _gate(ops, both, config)
    del both
    if bias:
        bias = ops.new(slots * config.hidden, itemsize)
    out = _product(ops, inner, slots, config.intermediate, config.hidden)
    del inner
    out = weighted(ops, out, weights)
    out = _index(ops, out, slots * config.hidden)
    summed = out.itemsize
    node = ops.tape.node(
        # The gradient of a sum is expanded, and materialized where it is used.
        (out,),
        lambda grad, saved: (ops.new(slots * config.hidden, summed),),
    )
    total = ops.new(tokens * config.hidden, summed)
    total.node = node
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


def _index(ops: Ops, x: Tensor, numel: int) -> Tensor:
    """Replay ``x[rows]``: a copy; its gradient is added into zeros."""
    whole, itemsize = x.numel, x.itemsize
    node = ops.tape.node((x,), lambda grad, saved: (ops.new(whole, itemsize),), (None,))
    out = ops.new(numel, itemsize)
    out.node = node
    return out


def _product(ops: Ops, x: Tensor, rows: int, inputs: int, outputs: int) -> Tensor:
    """Replay one grouped matrix product over all experts; with frozen weights no input is saved."""
    itemsize = x.itemsize
    node = ops.tape.node((x,), lambda grad, saved: (ops.new(rows * inputs, itemsize),), (None,))
    out = ops.new(rows * outputs, itemsize)
    out.node = node
    return out


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

    node = ops.tape.node((x, weights), fn, (x, weights))
    out = ops.new(numel, itemsize)
    out.node = node
    return out


def _in_turn(ops: Ops, config: Mixture, x: Tensor, weights: Tensor) -> Tensor:
    """Replay the experts in turn: gather tokens, run the MLP, add into the sum in place."""
    rows = ops.tokens * config.per_token // config.experts
    hidden, inner = config.hidden, config.intermediate
    total = ops.new(x.numel, x.itemsize)
    whole, itemsize = x.numel, x.itemsize
    for expert in range(config.experts):
        state = _index(ops, x, rows * hidden)
        gated = ops.activation(_expert(ops, config, state, "w1", hidden, inner), config.activation)
        product = ops.multiply(gated, _expert(ops, config, state, "w3", hidden, inner))
        del gated, state
        out = _expert(ops, config, product, "w2", inner, hidden)
        del product
        part = _index(ops, weights, rows)
        out = weighted(ops, out, part)
        # index_add_ in place: the part's gradient is the selected rows of the sum's.
        joined = ops.tape.node(
            (total if expert else None, out), lambda grad, saved: (grad, ops.new(rows * hidden, itemsize))
        )
        total = total.view(joined)
        del out, part
    del whole
    return total


def _expert(ops: Ops, config: Mixture, x: Tensor, name: str, inputs: int, outputs: int) -> Tensor:
    method = config.method if config.method in ("nf4", "fp4", "int8") else "none"
    return linear(ops, x, Linear(name, inputs, outputs, method))  # type: ignore[arg-type]  # a Linear module
