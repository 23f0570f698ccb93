"""Attention, kernel by kernel: what each saves and what its backward needs; DeepSeek's latent attention."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

from qlora_tui.memory.autograd import AllocationMeter, Grads, Storage, Tape, Tensor
from qlora_tui.memory.execution import Kernel
from qlora_tui.memory.linear import linear
from qlora_tui.memory.ops import FLOAT, Linear, Ops

ATTENTION_BLOCK_ROWS = 512
"""Queries whose scores our CPU backward holds at a time, twice (heads, rows, tokens): more would compute more
of the masked upper triangle, fewer make the matrix products too small."""
SAMPLE_PADDING_ROWS = 128
"""Rows that the backward of the varlen kernel adds for each sample to its sums in float32 (``mha_varlen_bwd``
in torch's ``flash_api.cpp``)."""
EXTRA_COLUMNS = 3
"""Extra columns of queries and keys there, for the value subtracted from each score in 16-bit parts."""


@dataclass(frozen=True)
class Heads:
    """The shape of one attention."""

    rows: int
    """Sequences in the micro-batch."""
    length: int
    """Tokens in each sequence."""
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    pieces: int = 1
    """Samples in one row, each attended separately (``training/packed_attention.py``) and concatenated."""
    samples: int = 0
    """Samples that one call of the varlen kernel attends to; 0 for other kernels."""
    softcap: bool = False
    sinks: bool = False
    """Whether a learned logit for each head takes part in the softmax (gpt-oss)."""
    repeated: bool = False
    """Whether the function that calls the kernel copies each key and value head for its query heads; the
    caller still holds the originals."""

    @property
    def scores(self) -> int:
        """Return the number of elements in the whole score matrix."""
        return self.rows * self.heads * self.length * self.length


def accumulator_width(head_dim: int) -> int:
    """Return the columns of a head in the sums of the varlen kernel's backward: its ``head_size_rounded``."""
    multiple = 32 if head_dim <= 128 else 64
    return -(-head_dim // multiple) * multiple


def attend(ops: Ops, q: Tensor, k: Tensor, v: Tensor, shape: Heads, kernel: Kernel) -> Tensor:
    """Compute the attention output, laid out for the output projection."""
    if (kernel == "flash" and ops.device == "cuda") or (ops.autocast and kernel != "eager"):
        # Flash kernels support two-byte dtypes only; transformers casts for them, autocast for SDPA.
        q, k, v = (ops.cast(tensor, ops.compute) for tensor in (q, k, v))
    # FlashAttention caps scores itself; transformers' SDPA omits the cap.
    if kernel != "eager" and ops.own_fused and (shape.softcap or shape.sinks):
        return _eager_attention(ops, q, k, v, shape)
    bfloat16 = q.itemsize < FLOAT and not ops.float16
    if (
        kernel == "flash"
        and ops.own_fused
        and ops.device == "cpu"
        and bfloat16
        and shape.head_dim == shape.value_dim
    ):
        return _by_blocks(ops, q, k, v, shape)
    if kernel in ("flash", "efficient"):
        grouped = shape.heads != shape.kv_heads
        if shape.repeated:
            k, v = _repeat(ops, k, shape), _repeat(ops, v, shape)
            grouped = False
        if shape.pieces > 1:
            # Views, whose gradients are joined in a copy.
            q, k, v = (ops.slice(tensor, tensor.numel) for tensor in (q, k, v))
        out = _fused(ops, q, k, v, shape, grouped=grouped and kernel == "flash")
        return ops.join(out) if shape.pieces > 1 else out
    return _written_out(ops, q, k, v, shape, math=kernel == "math")


def _repeat(ops: Ops, x: Tensor, shape: Heads) -> Tensor:
    """Replay ``repeat_kv``: each key and value head copied for the query heads that share it."""
    groups = shape.heads // max(shape.kv_heads, 1)
    if groups <= 1:
        return x
    return ops.apply(x, numel=x.numel * groups, itemsize=x.itemsize)


def _fused(ops: Ops, q: Tensor, k: Tensor, v: Tensor, shape: Heads, *, grouped: bool) -> Tensor:
    """Replay a kernel that saves q, k, v, its output and one number per row instead of the scores."""
    sizes, itemsize = (q.numel, k.numel, v.numel), q.itemsize
    statistic = shape.rows * shape.heads * shape.length
    half = itemsize == 2
    extra_rows = SAMPLE_PADDING_ROWS * shape.samples * shape.heads
    sums_numel = sizes[0]
    if shape.samples:
        sums_numel = (statistic + extra_rows) * accumulator_width(shape.head_dim)

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        delta = ops.new(statistic + extra_rows, FLOAT)
        # The gradient of q is summed over key blocks in float32 (dq_accum in flash_api.cpp, workspace_gq
        # in the CUTLASS kernel), unless everything is float32 already.
        sums = ops.new(sums_numel, FLOAT) if half else None
        gradients = [ops.new(size, itemsize) for size in sizes]
        if grouped:  # flash computes dk and dv for every query head, then sums over the groups
            spread = [
                ops.new(sizes[0], itemsize),
                ops.new(sizes[0] // shape.head_dim * shape.value_dim, itemsize),
            ]
            del spread
        del sums, delta
        return tuple(gradients)

    out = ops.new(sizes[0] // shape.head_dim * shape.value_dim, itemsize)
    row_sums = ops.new(statistic, FLOAT)
    out.node = ops.tape.node((q, k, v), fn, (q, k, v, out, row_sums))
    return out


def _by_blocks(ops: Ops, q: Tensor, k: Tensor, v: Tensor, shape: Heads) -> Tensor:
    """Replay our CPU bfloat16 code (``training/fused/cpu_attention.py``), a sample and a block at a time."""
    numel, shared, itemsize = q.numel, k.numel, q.itemsize
    statistic = shape.rows * shape.heads * shape.length

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        product = ops.new(numel, itemsize)
        less = ops.new(statistic, FLOAT)
        del product
        taken = [ops.new(EXTRA_COLUMNS * statistic, itemsize) for _ in range(2)]
        gradients = [ops.new(size, itemsize) for size in (numel, shared, shared)]
        _sample_backward(ops, numel // shape.rows, shared // shape.rows, itemsize, shape)
        del less, taken
        return tuple(gradients)

    out = ops.new(numel, itemsize)
    log_sums = ops.new(statistic, FLOAT)
    one, other = (ops.new(numel // shape.rows, itemsize) for _ in range(2))
    del one, other
    out.node = ops.tape.node((q, k, v), fn, (q, k, v, out, log_sums))
    return out


def _sample_backward(ops: Ops, numel: int, shared: int, itemsize: int, shape: Heads) -> None:
    """Replay the temporary tensors in the backward of one sample."""
    heads, tokens = shape.heads, numel // shape.head_dim // shape.heads
    rows, shared_rows = heads * tokens, shared // shape.head_dim
    laid_out = [
        ops.new(count * (shape.head_dim + EXTRA_COLUMNS), itemsize)
        for count in (rows, shared_rows, shared_rows, rows)
    ]
    laid_out.append(ops.new(shared, itemsize))  # keys without the storage they share
    sums = [ops.new(shared, itemsize) for _ in range(2)] if tokens > ATTENTION_BLOCK_ROWS else []
    for start in range(0, tokens, ATTENTION_BLOCK_ROWS):
        end = min(start + ATTENTION_BLOCK_ROWS, tokens)
        block, seen = (end - start) * heads, shared // tokens * end
        # One block covers all queries, without a copy.
        copies = (
            [ops.new(block * (shape.head_dim + EXTRA_COLUMNS), itemsize) for _ in range(2)] if sums else []
        )
        with ops.meter.attribute_to("scores"):
            weights = ops.new(block * end, itemsize)
            triangle = ops.new(block * (end - start), itemsize) if start else None
            del triangle
        v_gradient = ops.new(seen, itemsize)
        scores = ops.new(block * end, itemsize, "scores")
        q_gradient, k_gradient = ops.new(block * shape.head_dim, itemsize), ops.new(seen, itemsize)
        del v_gradient, q_gradient, k_gradient, weights, scores, copies
    del laid_out, sums


def _written_out(ops: Ops, q: Tensor, k: Tensor, v: Tensor, shape: Heads, *, math: bool) -> Tensor:
    """Replay softmax(q kᵀ) v with a tensor for every step; the score matrix is rows × heads × length².

    SDPA's fallback computes in float32 (``_scaled_dot_product_attention_math``); transformers' eager
    attention uses float32 for the softmax only.
    """
    scores, itemsize, numel = shape.scores, q.itemsize, q.numel // shape.head_dim * shape.value_dim
    if math:
        q, k, v = (ops.cast(tensor, FLOAT) for tensor in (q, k, v))
        q, k = ops.times_number(q), ops.times_number(k)
    else:
        k, v = _repeat(ops, k, shape), _repeat(ops, v, shape)
        if shape.rows > 1:
            q = ops.copy(q)
            if shape.heads == shape.kv_heads:
                k, v = ops.copy(k), ops.copy(v)
    with ops.meter.attribute_to("scores"):
        weights = ops.product(q, _broadcast(ops, k, shape) if math else k, scores)
        if not math:
            weights = ops.times_number(weights)
        if shape.softcap:
            weights = ops.times_number(ops.activation(ops.times_number(weights), "tanh"))
        weights = ops.copy(weights)  # plus the mask
        weights = ops.cast(_softmax(ops, weights, FLOAT), q.itemsize)
    out = ops.cast(ops.product(weights, _broadcast(ops, v, shape) if math else v, numel), itemsize)
    if not math:
        ops.returned_extra = weights
    # (rows, heads, length, dim) becomes (rows, length, heads × dim): a copy.
    return ops.copy(out)


def _broadcast(ops: Ops, x: Tensor, shape: Heads) -> Tensor:
    """Replay a matrix product's own broadcasting of shared heads: a view for one row, a copy for more."""
    return x if shape.rows == 1 else _repeat(ops, x, shape)


def _eager_attention(ops: Ops, q: Tensor, k: Tensor, v: Tensor, shape: Heads) -> Tensor:
    """Replay attention that no fused kernel supports, sample by sample: capped scores, sinks
    (``training/packed_attention.py``)."""
    one, others = replace(shape, rows=1, pieces=1), shape.pieces - 1
    if not others:
        return _unfused_attention(ops, one, q, k, v)
    halves = [ops.split(x, x.numel // shape.pieces * others, x.numel // shape.pieces) for x in (q, k, v)]
    parts = (
        _other_samples_unfused(ops, one, others, *(first for first, _ in halves)),
        _unfused_attention(ops, one, *(last for _, last in halves)),
    )
    del halves
    return ops.join(*parts)


def _other_samples_unfused(ops: Ops, one: Heads, samples: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Replay all samples except the last, as the tensors the graph saves and their output.

    Samples are equal and run one after another, so the peak is in the last one's forward and in its backward,
    which is the first.
    """
    itemsize, sizes = q.itemsize, (q.numel, k.numel, v.numel)
    saved_tensors = _saved_unfused(ops, one, samples, q, k, v)
    held: list[Tensor | None] = [None] * len(saved_tensors)
    if ops.tape.mode[0] != "first":  # a layer that will be recomputed saves nothing
        held = [ops.new(size * samples, 1, item) for item, size in saved_tensors.items()]
    shared = (q,) if one.heads != one.kv_heads else (q, k, v)  # repeated heads are copies
    node = ops.tape.node(
        (q, k, v), lambda grad, saved: tuple(ops.new(size, itemsize) for size in sizes), (*shared, *held)
    )
    out = ops.new(q.numel // one.head_dim * one.value_dim, itemsize)
    out.node = node
    return out


def _saved_unfused(ops: Ops, one: Heads, samples: int, q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """Return the elements that the graph saves for one of the samples besides q, k and v, by item."""
    separate_ops = copy(ops)
    separate_ops.meter = AllocationMeter()
    separate_ops.tape = Tape(separate_ops.meter)
    leaf, nothing = separate_ops.tape.leaf(), Storage(separate_ops.meter, 0)
    inputs = [Tensor(nothing, x.numel // samples, x.itemsize, leaf) for x in (q, k, v)]
    out = _unfused_attention(separate_ops, one, *inputs)
    out.storage.reattribute("output")
    return {item: size for item, size in separate_ops.meter.live_items.items() if size and item != "output"}


def _unfused_attention(ops: Ops, shape: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Replay the attention of one sample."""
    itemsize, scores = q.itemsize, shape.scores
    k, v = _repeat(ops, k, shape), _repeat(ops, v, shape)
    with ops.meter.attribute_to("scores"):
        allowed = ops.new(shape.length * shape.length, 1)
        weights = ops.times_number(ops.product(q, k, scores))
        if shape.softcap:
            weights = ops.times_number(ops.activation(ops.times_number(weights), "tanh"))
        mask = ops.new(shape.length * shape.length, 1)
        node = ops.tape.node((weights,), lambda grad, saved: (ops.new(scores, itemsize),), (mask,))
        weights = ops.new(scores, itemsize)
        weights.node = node
        if shape.sinks:
            column = shape.rows * shape.heads * shape.length
            node = ops.tape.node((weights,), lambda grad, saved: (grad.view(None),))
            weights = ops.new(scores + column, itemsize)
            weights.node = node
        weights = ops.cast(_softmax(ops, weights, FLOAT), itemsize)
        if shape.sinks:
            weights = ops.slice(weights, scores)
    out = ops.product(weights, v, q.numel // shape.head_dim * shape.value_dim)
    del weights, k, v, allowed, mask
    return out


def _softmax(ops: Ops, x: Tensor, itemsize: int) -> Tensor:
    """Replay ``softmax(x, dtype=…)``: saves its result. A GPU widens in the kernel, a CPU copies first."""
    if not (ops.float16 and ops.device == "cuda"):  # only Half is widened inside the kernel
        x = ops.cast(x, itemsize)
    numel, back = x.numel, x.itemsize

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        # softmax_backward_cuda_out makes grad * output first (aten/src/ATen/native/cuda/SoftMax.cu).
        gradient = ops.new(numel, back)
        product = ops.new(numel, itemsize) if ops.device == "cuda" else None
        del product
        return (gradient,)

    out = ops.new(numel, itemsize)
    out.node = ops.tape.node((x,), fn, (out,))
    return out


def latent_attention(
    ops: Ops,
    linears: dict[str, Linear],
    shape: Heads,
    kernel: Kernel,
    hidden_states: Tensor,
) -> Tensor:
    """Compute the attention output before the output projection."""
    down, up = linears["kv_a_proj_with_mqa"], linears["kv_b_proj"]
    heads, tokens = shape.heads, ops.tokens
    value_dim = linears["o_proj"].inputs // heads
    rope = down.outputs - up.inputs
    if "q_proj" in linears:
        query = linear(ops, hidden_states, linears["q_proj"])
    else:  # two projections with a norm between
        narrow = ops.rms_norm(linear(ops, hidden_states, linears["q_a_proj"]))
        query = linear(ops, narrow, linears["q_b_proj"])
        del narrow
    head_dim = query.numel // tokens // heads
    compressed = linear(ops, hidden_states, down)
    latent = ops.rms_norm(ops.slice(compressed, tokens * up.inputs))
    turned = _turned(ops, ops.slice(query, tokens * heads * rope))
    key_turned = _turned(ops, ops.slice(compressed, tokens * rope))
    del compressed
    passed = ops.slice(query, tokens * heads * (head_dim - rope))
    query = ops.apply(passed, turned, numel=tokens * heads * head_dim, itemsize=passed.itemsize)
    del passed, turned
    both = linear(ops, latent, up)
    del latent
    passed = ops.slice(both, tokens * heads * (head_dim - rope))
    key = ops.apply(passed, key_turned, numel=tokens * heads * head_dim, itemsize=passed.itemsize)
    del passed
    value = ops.slice(both, tokens * heads * value_dim)
    del both, key_turned
    own = replace(shape, kv_heads=heads, head_dim=head_dim, value_dim=value_dim)
    return attend(ops, query, key, value, own, kernel)


def _turned(ops: Ops, x: Tensor) -> Tensor:
    """Replay rotary positions as a product of complex numbers, in float32."""
    return ops.cast(ops.scale(ops.cast(x, FLOAT)), x.itemsize)
