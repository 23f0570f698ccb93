"""The operations of a decoder, each with what it allocates, saves and frees.

Every method mirrors one call in torch, transformers, peft or bitsandbytes; where it does something unexpected
(a copy, a cast, a saved tensor), the comment names that code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_tui.memory.autograd import AllocationMeter, BackwardFn, Grads, Storage, Tape, Tensor
from qlora_tui.memory.execution import ExecutionConfig

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
    rank: int = 0
    """Rank of its adapter; 0 where it is not a target."""
    dora: bool = False

    @property
    def weights(self) -> int:
        """Return the elements of the base weight."""
        return self.inputs * self.outputs


class Ops:
    """Operations on one tape, as one ``ExecutionConfig`` runs them."""

    def __init__(
        self, meter: AllocationMeter, execution: ExecutionConfig, *, tokens: int, dropout: float
    ) -> None:
        self.meter = meter
        self.tape = Tape(meter)
        self.tokens = tokens
        self.dropout = dropout
        self.compute = execution.compute_itemsize
        """Bytes per element of the compute dtype (to which 4-bit weights are dequantized)."""
        self.residual = execution.residual_itemsize
        """Bytes per element of the norms' weights."""
        self.device = execution.device
        self.autocast = execution.autocast
        self.own_fused = execution.own_fused
        self.triton = execution.triton
        self.float16 = execution.float16
        self.returned_extra: Tensor | None = None
        """A tensor that a layer's forward returns besides its output, and so holds until its end."""

    def new(self, numel: int, itemsize: int, item: str | None = None) -> Tensor:
        """Allocate an uninitialized tensor outside the graph."""
        return Tensor(Storage(self.meter, numel * itemsize, item), numel, itemsize)

    def apply(
        self,
        *inputs: Tensor,
        numel: int,
        itemsize: int,
        backward: BackwardFn | None = None,
        save: tuple[Tensor | None, ...] = (),
        saves_result: bool = False,
    ) -> Tensor:
        """Replay one differentiable operation; return its result.

        Args:
            inputs: its operands, with or without gradients.
            numel: elements of the result.
            itemsize: bytes of each.
            backward: what allocates the gradients; by default one for each input, of its size and dtype.
            save: tensors that the graph saves; None is a parameter.
            saves_result: whether it saves the result too, which exists before the node does.
        """
        if backward is None:
            sizes = [(each.numel, each.itemsize) for each in inputs]

            def backward(grad: Tensor, saved: list[Tensor | None]) -> Grads:
                return tuple([self.new(*size) for size in sizes])

        if saves_result:
            out = self.new(numel, itemsize)
            out.node = self.tape.node(inputs, backward, (*save, out))
            return out
        node = self.tape.node(inputs, backward, save)
        out = self.new(numel, itemsize)
        out.node = node
        return out

    def dequantized(self, module: Linear, itemsize: int) -> Tensor:
        """Replay dequantizing a packed weight for a product."""
        return self.new(module.weights, itemsize, "dequantized")

    def adapter_leaves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return an adapter's two weights as inputs of a node; their bytes are part of the static memory."""
        a, b = (Tensor(x.storage, 0, FLOAT, self.tape.leaf()) for _ in range(2))
        return a, b

    def cast(self, x: Tensor, itemsize: int) -> Tensor:
        """Replay ``x.to(dtype)``: nothing if the dtype is the same."""
        return x if x.itemsize == itemsize else self.apply(x, numel=x.numel, itemsize=itemsize)

    def copy(self, x: Tensor) -> Tensor:
        """Replay ``x.clone()``, ``x.contiguous()`` of a strided view, or a sum with a tensor that needs no
        gradient: a new tensor; the same gradient back."""
        return self.apply(x, numel=x.numel, itemsize=x.itemsize, backward=lambda grad, saved: (grad,))

    def join(self, *parts: Tensor) -> Tensor:
        """Replay ``cat``: a copy; its backward hands out views of the gradient."""
        numel, count = sum([part.numel for part in parts]), len(parts)
        return self.apply(
            *parts,
            numel=numel,
            itemsize=parts[0].itemsize,
            backward=lambda grad, saved: tuple([grad.view(None) for _ in range(count)]),
        )

    def slice(self, x: Tensor, numel: int) -> Tensor:
        """Replay a view of part of ``x``; its gradient is a full tensor of zeros with the part filled in."""
        full, itemsize = x.numel, x.itemsize
        node = self.tape.node((x,), lambda grad, saved: (self.new(full, itemsize),))
        return Tensor(x.storage, numel, itemsize, node)

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
        wanted = [(each.itemsize, each.needs_grad) for each in (a, b)]

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            return tuple([self.cast_gradient(grad, size) if needed else None for size, needed in wanted])

        return self.apply(a, b, numel=a.numel, itemsize=max(a.itemsize, b.itemsize), backward=fn)

    def cast_gradient(self, grad: Tensor, itemsize: int) -> Tensor:
        """Replay the cast of a gradient to the dtype of its tensor by the engine (``validate_outputs``)."""
        return grad if grad.itemsize == itemsize else self.new(grad.numel, itemsize)

    def scale(self, x: Tensor, itemsize: int | None = None) -> Tensor:
        """Replay the product with a tensor that needs no gradient, and which is all that is saved."""
        numel, back, wide = x.numel, x.itemsize, itemsize or x.itemsize

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            gradient = self.new(numel, wide)
            return (self.cast_gradient(gradient, back),)

        return self.apply(x, numel=numel, itemsize=wide, backward=fn, save=(None,))

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """Replay ``a * b`` where both need gradients: saves both."""
        numel, itemsize = a.numel, max(a.itemsize, b.itemsize)

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            return (self.new(numel, itemsize), self.new(numel, itemsize))

        return self.apply(a, b, numel=numel, itemsize=itemsize, backward=fn, save=(a, b))

    def product(self, a: Tensor, b: Tensor, numel: int) -> Tensor:
        """Replay a matrix product of two tensors that need gradients: saves both."""
        return self.apply(a, b, numel=numel, itemsize=a.itemsize, save=(a, b))

    def linear_map(self, x: Tensor, numel: int) -> Tensor:
        """Replay a selection of rows, or a product with frozen weights: saves no tensor."""
        return self.apply(x, numel=numel, itemsize=x.itemsize, save=(None,))

    def activation(self, x: Tensor, kind: str = "silu") -> Tensor:
        """Replay a fused pointwise activation: saves its input, or its result for relu and tanh."""
        if kind in ("gelu_new", "gelu_fast"):
            return self._gelu_in_steps(x)
        if kind in ("relu", "tanh"):
            return self.apply(x, numel=x.numel, itemsize=x.itemsize, saves_result=True)
        return self.apply(x, numel=x.numel, itemsize=x.itemsize, save=(x,))

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
        return self.apply(x, numel=x.numel, itemsize=x.itemsize)

    def dropout_residual(self, x: Tensor, share: float) -> Tensor:
        """Replay the base model's own dropout: saves a mask."""
        if not share:
            return x
        mask = self.new(x.numel, 1 if self.device == "cuda" else x.itemsize)
        return self.apply(x, numel=x.numel, itemsize=x.itemsize, save=(mask,))

    def rms_norm(self, x: Tensor, *, scale_in_float: bool = False) -> Tensor:
        """Replay RMSNorm as written in transformers: float32 inside, four passes over the row.

        ``x.to(float32)``; ``pow(2).mean``; ``x * rsqrt``; cast to the input's dtype; times the weight. Saved:
        the float32 copy (by pow and by the product). Gemma multiplies in float32 and casts last.
        """
        if self.own_fused:
            return self._lean_rms_norm(x)
        start = x.itemsize
        wide = self.cast(x, FLOAT)
        del x
        variance = self._mean(self._square(wide))
        inverse = self._inverse_root(variance)
        del variance
        normed = self._times_row_factors(wide, inverse)
        del wide, inverse
        if scale_in_float:
            return self.cast(self.scale(normed), start)
        return self.scale(self.cast(normed, start), max(self.residual, start))

    def cohere_norm(self, x: Tensor) -> Tensor:
        """Replay ``(x - mean) * rsqrt((x - mean).pow(2).mean() + eps)`` in float32, times the weight
        (modeling_cohere.py). The deviation is computed twice and saved twice, by the square and by the
        product."""
        start = x.itemsize
        wide = self.cast(x, FLOAT)
        del x
        mean = self._mean(wide)
        variance = self._mean(self._square(self._deviation(wide, mean)))
        deviation = self._deviation(wide, mean)
        inverse = self._inverse_root(variance)
        normed = self._times_row_factors(deviation, inverse)
        del wide, mean, variance, deviation, inverse
        return self.cast(self.scale(normed), start)

    def _square(self, x: Tensor) -> Tensor:
        """Replay ``pow(2)``: saves its input."""
        numel = x.numel

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            # grad * (2 * self.pow(1)): temporaries of a C++ expression live until its end.
            power, doubled = self.new(numel, FLOAT), self.new(numel, FLOAT)
            gradient = self.new(numel, FLOAT)
            del power, doubled
            return (gradient,)

        return self.apply(x, numel=numel, itemsize=FLOAT, backward=fn, save=(x,))

    def _mean(self, x: Tensor) -> Tensor:
        """Replay the mean of each row; its gradient is expanded over the row, and divided by the width."""
        return self.apply(x, numel=self.tokens, itemsize=FLOAT)

    def _inverse_root(self, x: Tensor) -> Tensor:
        return self.apply(x, numel=self.tokens, itemsize=FLOAT, saves_result=True)

    def _deviation(self, x: Tensor, mean: Tensor) -> Tensor:
        numel = x.numel

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            negated = self.new(numel, FLOAT)  # before the sum over the row
            del negated
            return (grad, self.new(self.tokens, FLOAT))

        return self.apply(x, mean, numel=numel, itemsize=FLOAT, backward=fn)

    def _times_row_factors(self, x: Tensor, row_factors: Tensor) -> Tensor:
        """Replay the product of each row with one number: saves both."""
        numel = x.numel

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            x_gradient = self.new(numel, FLOAT)
            spread = self.new(numel, FLOAT)
            del spread
            return (x_gradient, self.new(self.tokens, FLOAT))

        save = (x, row_factors)
        return self.apply(x, row_factors, numel=numel, itemsize=FLOAT, backward=fn, save=save)

    def _lean_rms_norm(self, x: Tensor) -> Tensor:
        """Replay our RMSNorm, which saves its uncast input and one number per row
        (``training/fused/norm_rotary.py``)."""
        numel, itemsize = x.numel, x.itemsize

        def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
            if self.triton:
                return (self.new(numel, itemsize),)
            x_gradient = self.new(numel, FLOAT)
            normed = self.new(numel, FLOAT)
            product = self.new(numel, FLOAT)
            del product, normed
            return (self.cast_gradient(x_gradient, itemsize),)

        squares = None if self.triton else self.new(numel, FLOAT)
        spread = self.new(self.tokens, FLOAT)
        del squares
        wide = None if self.triton else self.new(numel, FLOAT)
        out = self.new(numel, itemsize) if wide is None else self.cast_gradient(wide, itemsize)
        del wide
        out.node = self.tape.node((x,), fn, (x, spread))
        return out

    def layer_norm(self, x: Tensor) -> Tensor:
        """Replay ``torch.nn.LayerNorm``: one kernel that saves its input, mean and deviation."""
        wide = self.cast(x, max(self.residual, x.itemsize)) if self.autocast else x
        mean, deviation = self.new(self.tokens, FLOAT), self.new(self.tokens, FLOAT)
        save = (wide, None, mean, deviation, None)
        return self.apply(wide, numel=wide.numel, itemsize=wide.itemsize, save=save)

    def rotate(self, x: Tensor) -> Tensor:
        """Replay ``x * cos + rotate_half(x) * sin``; cos and sin need no gradient, so x is not saved."""
        straight = self.scale(x)
        turned = self.scale(self._rotate_half(x))
        return self.add(straight, turned)

    def _rotate_half(self, x: Tensor) -> Tensor:
        half = x.numel // 2
        low, high = self.slice(x, half), self.slice(x, half)
        negated = self.apply(
            high,
            numel=half,
            itemsize=x.itemsize,
            backward=lambda grad, saved: (self.new(half, grad.itemsize),),
        )
        return self.join(negated, low)

    def rotate_in_float(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Replay Cohere's rotary positions: both are rotated in float32 before either is cast back."""
        itemsize = query.itemsize
        query, key = self.cast(query, FLOAT), self.cast(key, FLOAT)
        turned, key_turned = self.rotate(query), self.rotate(key)
        return self.cast(turned, itemsize), self.cast(key_turned, itemsize)

    def rotate_together(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Replay our kernel for queries and keys, which saves nothing (``training/fused/norm_rotary.py``)."""
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
