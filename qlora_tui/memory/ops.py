"""The operations of a decoder, each with what it allocates, saves and frees.

Every method mirrors one call in torch, transformers, peft or bitsandbytes; where it does something unexpected
(a copy, a cast, a saved tensor), the comment names that code.

Cohere's own LayerNorm and rotary positions, written out in float32 (modeling_cohere.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_tui.memory.autograd import AllocationMeter, Grads, Storage, Tape, Tensor

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Linear:
    """One linear module of a layer, as the trainer runs it."""

    name: str
    inputs: int
    outputs: int
    method: Literal["nf4", "fp4", "int8", "none"]
    part: str = "other"
    """Part of the layer, as in the catalog: ``attention``, ``mlp``, ``shared_expert``."""
    bias: bool = False
    rank: int = 0
    """Rank of its adapter; 0 where it is not a target."""
    dora: bool = False

    @property
    def weights(self) -> int:
        """Return the elements of the base weight."""
        return self.inputs * self.outputs

    @property
    def adapter_parameters(self) -> int:
        """Return the elements of lora_A and lora_B (and of DoRA's magnitudes)."""
        if not self.rank:
            return 0
        return self.rank * (self.inputs + self.outputs) + (self.outputs if self.dora else 0)


class Ops:
    """Operations on one tape, as one ``ExecutionConfig`` runs them."""

    def __init__(
        self,
        meter: AllocationMeter,
        *,
        compute: int,
        weight: int,
        adapter: int,
        device: str,
        dropout: float,
        autocast: bool,
        tokens: int,
        own_fused: bool,
        triton: bool,
        float16: bool,
    ) -> None:
        self.meter = meter
        self.tape = Tape(meter)
        self.compute = compute
        """Bytes per element of the compute dtype (to which 4-bit weights are dequantized)."""
        self.weight = weight
        """Bytes per element of an unquantized weight."""
        self.adapter = adapter
        self.device = device
        self.dropout = dropout
        self.autocast = autocast
        self.tokens = tokens
        self.own_fused = own_fused
        self.triton = triton
        self.float16 = float16
        self.returned_extra: Tensor | None = None
        """A tensor that a layer's forward returns besides its output, and so holds until its end."""

    def new(self, numel: int, itemsize: int, item: str | None = None) -> Tensor:
        """Allocate an uninitialized tensor outside the graph."""
        return Tensor(Storage(self.meter, numel * itemsize, item), numel, itemsize)

    def dequantized(self, module: Linear, itemsize: int) -> Tensor:
        """Replay dequantizing a packed weight for a product."""
        with self.meter.attribute_to("dequantized"):
            return self.new(module.weights, itemsize)

    def adapter_leaves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return an adapter's two weights as inputs of a node; their bytes are part of the static memory."""
        a, b = (Tensor(x.storage, 0, self.adapter, self.tape.leaf()) for _ in range(2))
        return a, b

    def cast(self, x: Tensor, itemsize: int) -> Tensor:
        """Replay ``x.to(dtype)``: nothing if the dtype is the same."""
        if x.itemsize == itemsize:
            return x
        back, numel = x.itemsize, x.numel

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            return (self.new(numel, back),)

        node = self.tape.node((x,), fn)
        out = self.new(numel, itemsize)
        out.node = node
        return out

    def copy(self, x: Tensor) -> Tensor:
        """Replay ``x.clone()`` or ``x.contiguous()`` of a strided view: a copy; the same gradient back."""
        node = self.tape.node((x,), lambda grad, saved: (grad,))
        out = self.new(x.numel, x.itemsize)
        out.node = node
        return out

    def slice(self, x: Tensor, numel: int) -> Tensor:
        """Replay a view of part of ``x``; its gradient is a full tensor of zeros with the part filled in."""
        full, itemsize = x.numel, x.itemsize

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            return (self.new(full, itemsize),)

        return Tensor(x.storage, numel, x.itemsize, self.tape.node((x,), fn))

    def split(self, x: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        """Replay ``chunk`` or ``split``: views of these sizes; their gradients are joined once all exist."""
        full, itemsize = x.numel, x.itemsize
        waiting: list[Tensor] = []

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            waiting.append(grad)
            if len(waiting) < len(sizes):
                return (None,)
            gradient = self.new(full, itemsize)
            waiting.clear()
            return (gradient,)

        return tuple(Tensor(x.storage, size, itemsize, self.tape.node((x,), fn)) for size in sizes)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Replay an elementwise sum; the result has the wider dtype."""
        itemsize = max(a.itemsize, b.itemsize)
        itemsizes, needs = (a.itemsize, b.itemsize), (a.needs_grad, b.needs_grad)

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            return tuple(
                self._as(grad, wanted) if need else None
                for wanted, need in zip(itemsizes, needs, strict=True)
            )

        node = self.tape.node((a, b), fn)
        out = self.new(a.numel, itemsize)
        out.node = node
        return out

    def _as(self, grad: Tensor, itemsize: int) -> Tensor:
        """Cast a gradient to the dtype of its tensor, like the engine (``validate_outputs``)."""
        return grad if grad.itemsize == itemsize else self.new(grad.numel, itemsize)

    def scale(self, x: Tensor, itemsize: int | None = None) -> Tensor:
        """Replay ``x * number``, or times a tensor that needs no gradient: saves only that."""
        numel, back, wide = x.numel, x.itemsize, itemsize or x.itemsize

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            gradient = self.new(numel, wide)
            return (self._as(gradient, back),)

        node = self.tape.node((x,), fn, (None,))
        out = self.new(numel, wide)
        out.node = node
        return out

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """Replay ``a * b`` where both need gradients: saves both."""
        numel, itemsize = a.numel, max(a.itemsize, b.itemsize)

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            return (self.new(numel, itemsize), self.new(numel, itemsize))

        node = self.tape.node((a, b), fn, (a, b))
        out = self.new(numel, itemsize)
        out.node = node
        return out

    def activation(self, x: Tensor, kind: str = "silu") -> Tensor:
        """Replay a fused pointwise activation: saves its input, or its result for relu and tanh."""
        numel, itemsize = x.numel, x.itemsize
        if kind in ("gelu_new", "gelu_fast"):
            return self._gelu_in_steps(x)

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            return (self.new(numel, itemsize),)

        if kind in ("relu", "tanh"):
            out = self.new(numel, itemsize)
            out.node = self.tape.node((x,), fn, (out,))
            return out
        node = self.tape.node((x,), fn, (x,))
        out = self.new(numel, itemsize)
        out.node = node
        return out

    def _gelu_in_steps(self, x: Tensor) -> Tensor:
        """Replay ``NewGELUActivation``: 0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 x³))), in steps."""
        half = self.times_number(x)
        cubed = self.activation(x, "pow")
        inner = self.times_number(self.add(x, self.times_number(cubed)))
        del cubed
        tanh = self.times_number(self.activation(inner, "tanh"))  # plus one
        del inner
        return self.multiply(half, tanh)

    def times_number(self, x: Tensor) -> Tensor:
        """Replay adding or multiplying by a number: nothing is saved."""
        numel, itemsize = x.numel, x.itemsize
        node = self.tape.node((x,), lambda grad, saved: (self.new(numel, itemsize),))
        out = self.new(numel, itemsize)
        out.node = node
        return out

    def dropout_residual(self, x: Tensor, share: float) -> Tensor:
        """Replay the base model's own dropout: saves a mask."""
        if not share:
            return x
        numel, itemsize = x.numel, x.itemsize
        mask = self.new(numel, 1 if self.device == "cuda" else itemsize)
        node = self.tape.node((x,), lambda grad, saved: (self.new(numel, itemsize),), (mask,))
        out = self.new(numel, itemsize)
        out.node = node
        return out

    def rms_norm(self, x: Tensor, *, weight: int, scale_in_float: bool = False) -> Tensor:
        """Replay RMSNorm as written in transformers: float32 inside, four passes over the row.

        ``x.to(float32)``; ``pow(2).mean``; ``x * rsqrt``; cast to the input's dtype; times the weight. Saved:
        the float32 copy (by pow and by the product). Gemma multiplies in float32 and casts last.
        """
        if self.own_fused:
            return self._lean_rms_norm(x)
        start = x.itemsize
        wide = self.cast(x, FLOAT)
        del x
        normed = self._normalize(wide)
        del wide
        if scale_in_float:
            return self.cast(self.scale(normed), start)
        return self.scale(self.cast(normed, start), max(weight, start))

    def _normalize(self, wide: Tensor) -> Tensor:
        """Replay ``wide * rsqrt(wide.pow(2).mean(-1) + eps)``."""
        numel, rows = wide.numel, self.tokens

        def square(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            # grad * (2 * self.pow(1)): temporaries of a C++ expression live until its end.
            power = self.new(numel, FLOAT)
            doubled = self.new(numel, FLOAT)
            squares = self.new(numel, FLOAT)
            del power, doubled
            return (squares,)

        def mean(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            # The expanded gradient, divided by the width.
            return (self.new(numel, FLOAT),)

        def product(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            x_gradient = self.new(numel, FLOAT)
            spread = self.new(numel, FLOAT)
            del spread
            return (x_gradient, self.new(rows, FLOAT))

        node = self.tape.node((wide,), square, (wide,))
        squared = self.new(numel, FLOAT)
        squared.node = node
        node = self.tape.node((squared,), mean)
        variance = self.new(rows, FLOAT)
        variance.node = node
        del squared
        inverse = self.new(rows, FLOAT)
        inverse.node = self.tape.node((variance,), lambda grad, saved: (self.new(rows, FLOAT),), (inverse,))
        del variance
        node = self.tape.node((wide, inverse), product, (wide, inverse))
        out = self.new(numel, FLOAT)
        out.node = node
        return out

    def _lean_rms_norm(self, x: Tensor) -> Tensor:
        """Replay our RMSNorm, which saves its uncast input and one number per row
        (``training/fused/rms_norm.py``)."""
        numel, itemsize = x.numel, x.itemsize

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            if self.triton:
                return (self.new(numel, itemsize),)
            x_gradient = self.new(numel, FLOAT)
            normed = self.new(numel, FLOAT)
            product = self.new(numel, FLOAT)
            del product, normed
            return (self._as(x_gradient, itemsize),)

        squares = None if self.triton else self.new(numel, FLOAT)
        spread = self.new(self.tokens, FLOAT)
        del squares
        wide = None if self.triton else self.new(numel, FLOAT)
        out = self.new(numel, itemsize) if wide is None else self._as(wide, itemsize)
        del wide
        out.node = self.tape.node((x,), fn, (x, spread))
        return out

    def layer_norm(self, x: Tensor, *, weight: int) -> Tensor:
        """Replay ``torch.nn.LayerNorm``: one kernel that saves its input, mean and deviation."""
        wide = self.cast(x, max(weight, x.itemsize)) if self.autocast else x
        numel, itemsize = wide.numel, wide.itemsize

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            return (self.new(numel, itemsize),)

        mean, deviation = self.new(self.tokens, FLOAT), self.new(self.tokens, FLOAT)
        node = self.tape.node((wide,), fn, (wide, None, mean, deviation, None))
        out = self.new(numel, itemsize)
        out.node = node
        return out

    def rotate(self, x: Tensor, itemsize: int | None = None) -> Tensor:
        """Replay ``x * cos + rotate_half(x) * sin``; cos and sin need no gradient, so x is not saved."""
        straight = self.scale(x, itemsize)
        turned = self.scale(self._rotate_half(x), itemsize)
        return self.add(straight, turned)

    def rotate_together(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Replay our kernel for queries and keys, which saves nothing (``training/fused/rotary.py``)."""
        sizes = ((q.numel, q.itemsize), (k.numel, k.itemsize))
        waiting: list[Tensor] = []

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            waiting.append(grad)
            if len(waiting) < len(sizes):
                return (None, None)
            gradients = tuple(self.new(*size) for size in sizes)
            waiting.clear()
            return gradients

        rotated = []
        for size in sizes:
            rotated.append(self.new(*size))
            rotated[-1].node = self.tape.node((q, k), fn)
        return rotated[0], rotated[1]

    def _rotate_half(self, x: Tensor) -> Tensor:
        half = x.numel // 2
        low, high = self.slice(x, half), self.slice(x, half)
        node = self.tape.node((high,), lambda grad, saved: (self.new(half, grad.itemsize),))
        negated = self.new(half, x.itemsize)
        negated.node = node
        # cat's backward hands out views of the gradient.
        node = self.tape.node((negated, low), lambda grad, saved: (grad.view(None), grad.view(None)))
        out = self.new(x.numel, x.itemsize)
        out.node = node
        return out


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
