"""Cohere's own LayerNorm and rotary positions, written out in float32 (modeling_cohere.py)."""

from __future__ import annotations

from qlora_tui.memory.autograd import Grads, Tensor
from qlora_tui.memory.ops import FLOAT, Ops


def layer_norm(ops: Ops, x: Tensor) -> Tensor:
    """Replay ``(x - mean) * rsqrt((x - mean).pow(2).mean() + eps)``, times the weight.

    The deviation is computed twice and saved twice, by the square and by the product.
    """
    start = x.itemsize
    wide = ops.cast(x, FLOAT)
    del x
    mean = _mean(ops, wide)
    variance = _mean(ops, _square(ops, _deviation(ops, wide, mean)))
    deviation = _deviation(ops, wide, mean)
    inverse = ops.new(ops.tokens, FLOAT)
    inverse.node = ops.tape.node((variance,), lambda grad, saved: (ops.new(ops.tokens, FLOAT),), (inverse,))
    normed = _product(ops, deviation, inverse)
    del wide, mean, variance, deviation, inverse
    return ops.cast(ops.scale(normed), start)


def rotate(ops: Ops, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Replay the rotary positions: query and key are both rotated in float32 before either is cast back."""
    itemsize = query.itemsize
    query, key = ops.cast(query, FLOAT), ops.cast(key, FLOAT)
    turned, key_turned = ops.rotate(query), ops.rotate(key)
    return ops.cast(turned, itemsize), ops.cast(key_turned, itemsize)


def _mean(ops: Ops, x: Tensor) -> Tensor:
    """Replay the mean of each row; its gradient is expanded over the row."""
    numel = x.numel
    node = ops.tape.node((x,), lambda grad, saved: (ops.new(numel, FLOAT),))
    out = ops.new(ops.tokens, FLOAT)
    out.node = node
    return out


def _deviation(ops: Ops, x: Tensor, mean: Tensor) -> Tensor:
    numel = x.numel

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        negated = ops.new(numel, FLOAT)  # before the sum over the row
        del negated
        return (grad, ops.new(ops.tokens, FLOAT))

    node = ops.tape.node((x, mean), fn)
    out = ops.new(numel, FLOAT)
    out.node = node
    return out


def _square(ops: Ops, x: Tensor) -> Tensor:
    """Replay ``pow(2)``: saves its input."""
    numel = x.numel

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        # grad * (2 * self.pow(1)): temporaries of a C++ expression live until its end.
        power, doubled = ops.new(numel, FLOAT), ops.new(numel, FLOAT)
        gradient = ops.new(numel, FLOAT)
        del power, doubled
        return (gradient,)

    node = ops.tape.node((x,), fn, (x,))
    out = ops.new(numel, FLOAT)
    out.node = node
    return out


def _product(ops: Ops, x: Tensor, row_factors: Tensor) -> Tensor:
    """Replay the product of each row with one number: saves both."""
    numel = x.numel

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        x_gradient = ops.new(numel, FLOAT)
        spread = ops.new(numel, FLOAT)
        del spread
        return (x_gradient, ops.new(ops.tokens, FLOAT))

    node = ops.tape.node((x, row_factors), fn, (x, row_factors))
    out = ops.new(numel, FLOAT)
    out.node = node
    return out
