"""The output head and the loss, as each code path computes them."""

from __future__ import annotations

from qlora_tui.memory.autograd import Grads, Tensor
from qlora_tui.memory.execution import LOSS_BLOCK_ROWS, LOSS_CHUNK_ROWS, ExecutionConfig, liger_rows
from qlora_tui.memory.layout import Layout
from qlora_tui.memory.ops import FLOAT, Ops


def head_and_loss(
    ops: Ops, layout: Layout, execution: ExecutionConfig, hidden: Tensor, itemsize: int
) -> tuple[Tensor, list[Tensor]]:
    """Replay head and loss; return the scalar loss, and what is held after its backward.

    That are logits that the caller refers to, and the gradient of a trained head.
    """
    if execution.loss == "chunked":
        return _chunked(ops, layout, execution, hidden, itemsize)
    if execution.loss == "liger":
        return _liger(ops, layout, hidden, itemsize), []
    logits = _head(ops, layout, hidden, layout.tokens, itemsize)
    with ops.meter.attribute_to("logits"):
        wide = logits if layout.loss_code == "narrow" else ops.cast(logits, FLOAT)
        if layout.loss_code == "rebound":
            logits = wide
        if layout.loss_code == "padded":
            source = wide
        else:  # logits[..., :-1, :].contiguous()
            source = ops.copy(ops.slice(wide, wide.numel - layout.rows * layout.vocabulary))
        return _cross_entropy(ops, source), [logits] if execution.logits_alive_in_backward else []


def _head(ops: Ops, layout: Layout, hidden: Tensor, rows: int, itemsize: int) -> Tensor:
    """Replay ``lm_head(hidden)`` and the family's operations on the logits."""
    numel, weight = rows * layout.hidden, None
    if ops.autocast:
        if itemsize != ops.compute:  # a weight in float32, which the product saves in autocast's dtype
            weight = ops.new(layout.vocabulary * layout.hidden, ops.compute, "head")
        itemsize = ops.compute
        hidden = ops.cast(hidden, itemsize)

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        return (ops.new(numel, itemsize),)

    with ops.meter.attribute_to("logits"):
        node = ops.tape.node((hidden,), fn, (weight,))
        logits = ops.new(rows * layout.vocabulary, itemsize)
        logits.node = node
        if layout.logit_scale:
            logits = ops.times_number(logits)
        if layout.softcap:
            logits = ops.times_number(logits)
            logits = ops.activation(logits, "relu")  # tanh: saves its result
            logits = ops.times_number(logits)
    return logits


def _cross_entropy(ops: Ops, logits: Tensor) -> Tensor:
    """Replay log-softmax (saved) and the gradients of both its steps: three tensors at the peak."""
    numel, itemsize = logits.numel, logits.itemsize

    def softmax_grad(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        return (ops.new(numel, itemsize),)

    def pick_grad(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        return (ops.new(numel, itemsize),)

    likely = ops.new(numel, itemsize)
    likely.node = ops.tape.node((logits,), softmax_grad, (likely,))
    node = ops.tape.node((likely,), pick_grad, (likely,))
    loss = ops.new(1, FLOAT)
    loss.node = node
    return loss


def _chunked(
    ops: Ops, layout: Layout, execution: ExecutionConfig, hidden: Tensor, itemsize: int
) -> tuple[Tensor, list[Tensor]]:
    """Replay our loss (``training/chunked_loss.py``), with every token in the loss: the worst case.

    The positions in the loss are copied out; their gradient is computed one chunk of logits at a time, in
    place. The gradient of a trained head is held after the backward unless it is added to that of earlier
    micro-steps.
    """
    rows = min(LOSS_CHUNK_ROWS, layout.tokens)
    numel, chunk, item = hidden.numel, rows * layout.vocabulary, "hidden_gradient"
    gradient_itemsize = FLOAT if execution.float16 else itemsize

    def scaled(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        gradient = ops.new(numel, gradient_itemsize)
        return (gradient if gradient_itemsize == itemsize else ops.new(numel, itemsize),)

    with ops.meter.attribute_to(item):
        states = _states_in_loss(ops, hidden, itemsize)
        hidden_gradient = ops.new(numel, gradient_itemsize)
        row_gradients = ops.new(layout.token_rows * layout.hidden, FLOAT)
    with ops.meter.attribute_to("gradients"):
        matrix_gradient = ops.new(layout.trained_matrix, FLOAT)
    with ops.meter.attribute_to("logits"):
        narrow = ops.new(layout.trained_matrix, itemsize) if itemsize != FLOAT else None
        values = ops.new(layout.token_rows * layout.hidden, itemsize) if itemsize != FLOAT else None
        logits = ops.new(chunk, itemsize)
        own = ops.new(rows * layout.token_rows, FLOAT)
        block = _logits_gradient(
            ops, layout, min(LOSS_BLOCK_ROWS[execution.device], rows) * layout.vocabulary, itemsize
        )
        del block
        product = ops.new(rows * layout.hidden, itemsize)
        del product, own, logits, values, narrow
    with ops.meter.attribute_to(item):
        node = ops.tape.node((states,), scaled, (hidden_gradient, row_gradients, matrix_gradient))
    loss = ops.new(1, FLOAT)
    loss.node = node
    return loss, [matrix_gradient] if layout.trained_matrix and not execution.accumulates else []


def _states_in_loss(ops: Ops, hidden: Tensor, itemsize: int) -> Tensor:
    """Replay the selection of the hidden states at the positions in the loss, as a copy."""
    numel = hidden.numel

    def spread(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        # The gradient of a masked index is a full tensor of zeros with the rows filled in.
        return (ops.new(numel, itemsize),)

    cut = hidden.view(ops.tape.node((hidden,), spread))
    node = ops.tape.node((cut,), spread, (None,))
    states = ops.new(numel, itemsize)
    states.node = node
    return states


def _logits_gradient(ops: Ops, layout: Layout, numel: int, itemsize: int) -> Tensor:
    """Replay the gradient of a block of logits, in float32 like all intermediate values."""
    logits, capped = ops.new(numel, FLOAT) if itemsize != FLOAT else None, None
    if layout.logit_scale:
        logits = ops.new(numel, FLOAT)
    if layout.softcap:
        capped = ops.new(numel, FLOAT)
        logits = ops.new(numel, FLOAT)
    likely = ops.new(numel, FLOAT)
    del logits, capped
    return likely


def _liger(ops: Ops, layout: Layout, hidden: Tensor, itemsize: int) -> Tensor:
    """Replay Liger's fused linear cross-entropy: chunks of ``tokens / ceil(vocabulary / hidden)`` rows.

    Our trainer passes it the positions in the loss: in the worst case, all of them.
    """
    rows = liger_rows(layout.tokens, layout.hidden, layout.vocabulary)
    numel = hidden.numel
    with ops.meter.attribute_to("hidden_gradient"):
        states = _states_in_loss(ops, hidden, itemsize)
        if layout.logit_scale:
            states = ops.times_number(states)
        hidden_gradient = ops.new(numel, itemsize)
    with ops.meter.attribute_to("logits"):
        logits = ops.new(rows * layout.vocabulary, itemsize)
        del logits
    # Multiplied by the gradient of the loss in place (element_mul_kernel).
    node = ops.tape.node((states,), lambda grad, saved: (saved[0],), (hidden_gradient,))
    loss = ops.new(1, FLOAT)
    loss.node = node
    return loss
