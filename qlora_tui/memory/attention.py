"""Scaled dot-product attention, kernel by kernel: what each keeps and what its backward needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_tui.memory.ops import FLOAT, Ops
from qlora_tui.memory.tape import Grads, Tensor

Kernel = Literal["flash", "efficient", "math", "eager"]
"""flash: FlashAttention (its own or SDPA's). efficient: SDPA's memory-efficient kernel. math: SDPA without
a fused kernel. eager: transformers' own, which keeps the scores."""


@dataclass(frozen=True)
class Heads:
    """The shape of one attention."""

    rows: int
    """Sequences in the micro-batch."""
    length: int
    """Tokens in each."""
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    pieces: int = 1
    """Samples in one row, each attended by itself (``training/attention.py``); their outputs are joined."""
    softcap: bool = False
    sinks: bool = False
    """A learned logit a head that takes part in the softmax (gpt-oss)."""

    @property
    def scores(self) -> int:
        """Elements of the whole score matrix."""
        return self.rows * self.heads * self.length * self.length


def attend(ops: Ops, q: Tensor, k: Tensor, v: Tensor, shape: Heads, kernel: Kernel) -> Tensor:
    """The attention's output, laid out for the output projection."""
    if (kernel == "flash" and ops.device == "cuda") or (ops.autocast and kernel != "eager"):
        # Flash kernels know two bytes only; transformers casts for them, autocast for SDPA.
        q, k, v = (ops.cast(tensor, ops.compute) for tensor in (q, k, v))
    if kernel in ("flash", "efficient"):
        if kernel == "efficient":
            k, v = _repeat(ops, k, shape), _repeat(ops, v, shape)
        if shape.pieces > 1:
            q, k, v = (_split(ops, tensor) for tensor in (q, k, v))
        out = _fused(ops, q, k, v, shape, flash=kernel == "flash")
        return _joined(ops, out) if shape.pieces > 1 else out
    return _written_out(ops, q, k, v, shape, math=kernel == "math")


def _split(ops: Ops, x: Tensor) -> Tensor:
    """``split``: views; the gradients of the pieces are joined in a copy."""
    numel, width = x.numel, x.width
    return x.view(ops.tape.node((x,), lambda grad, saved: (ops.new(numel, width),)))


def _joined(ops: Ops, x: Tensor) -> Tensor:
    """``cat``: a copy; its gradient is handed out in views."""
    out = ops.new(x.numel, x.width)
    out.node = ops.tape.node((x,), lambda grad, saved: (grad.view(None),))
    return out


def _repeat(ops: Ops, x: Tensor, shape: Heads) -> Tensor:
    """``repeat_kv``: each key and value head copied for the query heads that share it."""
    groups = shape.heads // max(shape.kv_heads, 1)
    if groups <= 1:
        return x
    small, width, numel = x.numel, x.width, x.numel * groups

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        return (ops.new(small, width),)

    node = ops.tape.node((x,), fn)
    out = ops.new(numel, width)
    out.node = node
    return out


def _fused(ops: Ops, q: Tensor, k: Tensor, v: Tensor, shape: Heads, *, flash: bool) -> Tensor:
    """A kernel that keeps q, k, v, its output and one number a row instead of the scores."""
    sizes, width = (q.numel, k.numel, v.numel), q.width
    statistic = shape.rows * shape.heads * shape.length
    grouped = flash and shape.heads != shape.kv_heads
    half = width == 2

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        delta = ops.new(statistic, FLOAT)
        # The gradient of q is summed over key blocks in float32 (dq_accum in flash_api.cpp, workspace_gq
        # in the CUTLASS kernel), unless everything is float32 already.
        sums = ops.new(sizes[0], FLOAT) if half else None
        made = [ops.new(size, width) for size in sizes]
        if grouped:  # flash computes dk and dv for every query head, then adds the groups up
            spread = [ops.new(sizes[0], width), ops.new(sizes[0] // shape.head_dim * shape.value_dim, width)]
            del spread
        del sums, delta
        return tuple(made)

    out = ops.new(sizes[0] // shape.head_dim * shape.value_dim, width)
    row_sums = ops.new(statistic, FLOAT)
    out.node = ops.tape.node((q, k, v), fn, (q, k, v, out, row_sums))
    return out


def _written_out(ops: Ops, q: Tensor, k: Tensor, v: Tensor, shape: Heads, *, math: bool) -> Tensor:
    """softmax(q kᵀ) v with every step a tensor; the score matrix is rows × heads × length²."""
    k, v = _repeat(ops, k, shape), _repeat(ops, v, shape)
    scores, width = shape.scores, q.width
    with ops.meter.booking("scores"):
        weights = _product(ops, q, k, scores)
        if not math:
            weights = ops.scale(weights)
        if shape.softcap:
            weights = ops.scale(ops.activation(ops.scale(weights), "relu"))
        weights = _masked(ops, weights)
        weights = _softmax(ops, weights, FLOAT if not math else width)
        weights = ops.cast(weights, width)
    out = _product(ops, weights, v, q.numel // shape.head_dim * shape.value_dim)
    del weights, k, v
    # (rows, heads, length, dim) becomes (rows, length, heads × dim): a copy.
    return ops.copy(out)


def _product(ops: Ops, a: Tensor, b: Tensor, numel: int) -> Tensor:
    sizes, width = (a.numel, b.numel), a.width

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        return (ops.new(sizes[0], width), ops.new(sizes[1], width))

    node = ops.tape.node((a, b), fn, (a, b))
    out = ops.new(numel, width)
    out.node = node
    return out


def _masked(ops: Ops, x: Tensor) -> Tensor:
    """``scores + mask``: a sum with something that needs no gradient."""
    node = ops.tape.node((x,), lambda grad, saved: (grad,))
    out = ops.new(x.numel, x.width)
    out.node = node
    return out


def _softmax(ops: Ops, x: Tensor, width: int) -> Tensor:
    """``softmax(x, dtype=…)``: saves its result. A GPU widens inside the kernel, a CPU makes a copy first."""
    if ops.device != "cuda":
        x = ops.cast(x, width)
    numel, back = x.numel, x.width

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        # softmax_backward_cuda_out makes grad * output first (aten/src/ATen/native/cuda/SoftMax.cu).
        product = ops.new(numel, width) if ops.device == "cuda" else None
        made = ops.new(numel, back)
        del product
        return (made,)

    out = ops.new(numel, width)
    out.node = ops.tape.node((x,), fn, (out,))
    return out
