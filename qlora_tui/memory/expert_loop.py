"""Fused experts computed one at a time, as ``training/experts/routed_function.py`` does.

The rows of one expert are replayed, as each frees its own before the next. Tokens are assumed to spread
evenly over the experts.
"""

from __future__ import annotations

from qlora_tui.memory.autograd import Grads, Tensor
from qlora_tui.memory.four_bit import BLOCK
from qlora_tui.memory.mixture import Mixture
from qlora_tui.memory.ops import FLOAT, Ops

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
