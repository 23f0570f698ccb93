"""The loss of TRL's SFTTrainer without full logits (``trl/trainer/sft_trainer.py``)."""

from __future__ import annotations

from qlora_tui.memory.autograd import BackwardFn, Grads, Tensor
from qlora_tui.memory.layout import Layout
from qlora_tui.memory.ops import FLOAT, Ops

CHUNK_ROWS = 256
"""``_CHUNKED_LM_HEAD_CHUNK_SIZE``: positions whose logits are in memory at a time, in float32."""
TILE_ROWS, TILE_COLUMNS = 4096, 32768
"""``TOKEN_CHUNK_SIZE`` and ``_CHUNKED_LOGPROB_CHUNK_SIZE``: the tile of the logits in memory at a time."""


def chunked(ops: Ops, layout: Layout, hidden: Tensor) -> Tensor:
    """Replay TRL 1.7 to 1.14 (``_chunked_cross_entropy_loss``): each chunk is checkpointed, casts the whole
    head to float32 (autocast then casts it back), and computes its entropy as well as its loss."""
    states = _shifted(ops, layout, hidden)
    numel, itemsize = states.numel, states.itemsize
    head, rows = layout.vocabulary * layout.hidden, min(CHUNK_ROWS, layout.tokens)
    chunk = rows * layout.vocabulary

    def project() -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight that the product saves, the logits, and their log-softmax."""
        weight = ops.new(head, FLOAT)
        if ops.autocast:
            weight = ops.new(head, ops.compute)
        logits = ops.new(chunk, ops.compute if ops.autocast else FLOAT)
        for _ in range(layout.logit_scale + layout.softcap):
            logits = ops.new(chunk, logits.itemsize)
        widened = ops.new(chunk, FLOAT) if logits.itemsize != FLOAT else None
        log_probabilities = ops.new(chunk, FLOAT)
        del widened
        return weight, logits, log_probabilities

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        hidden_gradient = ops.new(numel, itemsize)  # the gradients of the chunks' slices, each of full size
        with ops.meter.attribute_to("logits"):
            projected = project()
            entropy = [ops.new(chunk, FLOAT) for _ in range(2)]
            entropy.pop()
            logits_gradient = ops.new(chunk, FLOAT)
            through_softmax = ops.new(chunk, FLOAT)
            del projected, entropy, logits_gradient, through_softmax
        another = ops.new(numel, itemsize)
        del another
        return (hidden_gradient,)

    with ops.meter.attribute_to("logits"):
        projected = project()
        entropy = [ops.new(chunk, FLOAT) for _ in range(2)]
        del projected, entropy
    return _scalar(ops, states, fn, ())


def tiled(ops: Ops, layout: Layout, hidden: Tensor) -> Tensor:
    """Replay TRL from 1.15 on (``ChunkedLogProbFunction``): one tile of logits at a time, recomputed in the
    backward, where the gradient of the hidden states is summed in float32."""
    states = _shifted(ops, layout, hidden)
    numel, itemsize = states.numel, states.itemsize
    rows, columns = min(TILE_ROWS, layout.tokens), min(TILE_COLUMNS, layout.vocabulary)

    def tile() -> None:
        with ops.meter.attribute_to("logits"):
            logits = ops.new(rows * columns, ops.compute)
            del logits

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        hidden_gradient = ops.new(numel, FLOAT)
        tile()
        return (ops.new(numel, itemsize) if itemsize != hidden_gradient.itemsize else hidden_gradient,)

    tile()
    return _scalar(ops, states, fn, (states,))


def _shifted(ops: Ops, layout: Layout, hidden: Tensor) -> Tensor:
    """Replay ``hidden[:, :-1][mask]``, every label valid: a copy; its gradient is put into zeros."""
    whole, itemsize = hidden.numel, hidden.itemsize

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        return (ops.new(whole, itemsize),)

    cut = hidden.view(ops.tape.node((hidden,), fn))
    part = whole - layout.rows * layout.hidden
    node = ops.tape.node((cut,), fn, (None,))
    states = ops.new(part, itemsize)
    states.node = node
    return states


def _scalar(ops: Ops, states: Tensor, fn: BackwardFn, saved: tuple[Tensor, ...]) -> Tensor:
    loss = ops.new(1, FLOAT)
    loss.node = ops.tape.node((states,), fn, saved)
    return loss
