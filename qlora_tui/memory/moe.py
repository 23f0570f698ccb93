"""A mixture of experts instead of the MLP.

transformers 5 keeps the experts as two fused 3-D parameters and sorts the tokens by expert
(``integrations/moe.py``, ``grouped_mm_experts_forward``); before, each expert was a separate module and
processed its tokens in turn. Fused experts in 4 bits, or with adapters, are in :mod:`.expert_loop`. Tokens
are assumed to spread evenly over the experts.
"""

from __future__ import annotations

from qlora_tui.memory.autograd import Grads, Tensor
from qlora_tui.memory.expert_loop import routed_experts
from qlora_tui.memory.linear import linear
from qlora_tui.memory.mixture import Mixture
from qlora_tui.memory.ops import FLOAT, Linear, Ops


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
