"""The output head in chunks: logits, losses and gradients of a few tokens at a time.

The gradient of a chunk overwrites its logits, so nothing as wide as the vocabulary outlives it. What becomes
of losses and gradients is the caller's: a sum in ``chunked_loss``, a loss for each token in ``token_losses``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_tui.memory.execution import LOSS_BLOCK_ROWS, LOSS_CHUNK_ROWS
from qlora_tui.training.padding import pad_tokens


@dataclass(frozen=True)
class ChunkedHead:
    """The computation from the last hidden state to logits, in the forms that are supported."""

    projection: nn.Linear
    multiplier: float
    """Factor on the logits: Granite's 1 / ``logits_scaling``, Cohere's ``logit_scale``."""
    softcap: float | None
    """Gemma's ``final_logit_softcapping``: logits become softcap · tanh(logits / softcap)."""


def empty_gradient(states: Tensor) -> Tensor:
    """Memory for the gradient at ``states``, (tokens, hidden), until the backward.

    In fp16 the gradients would vanish: they stay in fp32 until the backward applies the loss scale.
    """
    dtype = torch.float32 if states.dtype == torch.float16 else states.dtype
    return torch.empty(states.shape, dtype=dtype, device=states.device)


def pass_through_head(
    states: Tensor,
    targets: Tensor,
    head: ChunkedHead,
    ids: Tensor | None,
    values: Tensor | None,
    grad: Tensor | None,
    on_block: Callable[[slice, Tensor, Tensor | None], None],
    on_rows: Callable[[slice, Tensor, Tensor], None],
    matrix: Tensor | None = None,
    on_chunk: Callable[[Tensor, Tensor], None] = lambda logit_grads, chunk: None,
) -> None:
    """Compute the loss of each token, a chunk of logits and then a block of losses at a time.

    Args:
        states: (tokens, hidden), the input of the head.
        targets: (tokens,), token ids.
        head: the output head.
        ids: (rows,), token ids whose rows of the head are replaced by ``values``.
        values: (rows, hidden).
        grad: gets the gradient at ``states``, (tokens, hidden); None computes no gradients.
        on_block: receives which tokens, their losses (block, 1) and the gradients at their logits (block,
            vocabulary), which it may change in place; None for these without ``grad``.
        on_rows: receives which tokens, the gradients at the logits of replaced rows (chunk, rows), and the
            chunk of ``states`` in the dtype of the head; not called without ``grad`` or ``values``.
        matrix: (vocabulary, hidden), in place of the head's own weight, in its dtype.
        on_chunk: receives the gradients at the logits of a chunk (chunk, vocabulary) and the chunk of
            ``states``, both in the dtype of the head; not called without ``grad``.
    """
    weight, bias = head.projection.weight, head.projection.bias
    if matrix is not None:
        weight = matrix
    rows = None if values is None else values.to(weight.dtype)
    block = block_rows(states.device)
    for start in range(0, len(targets), LOSS_CHUNK_ROWS):
        end = min(start + LOSS_CHUNK_ROWS, len(targets))
        chunk, target = states[start:end].to(weight.dtype), targets[start:end, None]
        with torch.autocast(states.device.type, enabled=False):
            padded_logits = nn.functional.linear(pad_tokens(chunk), weight, bias)
        # The padding rows are carried along unread, which saves a copy without them.
        logits = padded_logits[: len(chunk)]
        if ids is not None and rows is not None:
            logits.index_copy_(1, ids, chunk @ rows.t())
        row_logit_grads = None
        if grad is not None and values is not None and ids is not None:
            row_logit_grads = values.new_empty(len(chunk), len(ids))
        for at in range(0, len(chunk), block):
            within = slice(at, min(at + block, len(chunk)))
            losses, logit_grads = losses_and_grads(
                logits[within], target[within], head, needs_grad=grad is not None
            )
            on_block(slice(start + within.start, start + within.stop), losses, logit_grads)
            if logit_grads is None:
                continue
            if ids is not None and row_logit_grads is not None:
                row_logit_grads[within] = logit_grads.index_select(1, ids)
                logit_grads.index_fill_(1, ids, 0)
            logits[within] = logit_grads
            # Otherwise it would stay in memory beside that of the next block.
            del logit_grads
        if grad is not None:
            on_chunk(logits, chunk)
            grad_chunk = (padded_logits @ weight)[: len(chunk)]
            if row_logit_grads is not None and rows is not None:
                on_rows(slice(start, end), row_logit_grads, chunk)
                grad_chunk.addmm_(row_logit_grads.to(rows.dtype), rows)
            grad[start:end] = grad_chunk
            del grad_chunk
        # Otherwise they would stay in memory beside those of the next chunk.
        del logits, padded_logits, row_logit_grads


def block_rows(device: torch.device) -> int:
    """Rows of a chunk that are in fp32 at a time."""
    return LOSS_BLOCK_ROWS["cuda" if device.type == "cuda" else "cpu"]


def losses_and_grads(
    logits: Tensor, targets: Tensor, head: ChunkedHead, *, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy and its gradient at the logits, before the head's multiplier and soft cap.

    Args:
        logits: (rows, vocabulary), as the projection gives them.
        targets: (rows, 1).

    Returns:
        Losses (rows, 1) and gradients (rows, vocabulary), None without ``needs_grad``. Both are fp32.
    """
    logits, tanh_logits = logits.float(), None
    if head.multiplier != 1.0:
        logits = logits * head.multiplier
    if head.softcap is not None:
        tanh_logits = (logits / head.softcap).tanh_()
        logits = tanh_logits * head.softcap
    log_probs = logits.log_softmax(dim=-1)
    losses = -log_probs.gather(1, targets)
    if not needs_grad:
        return losses, None
    logit_grads = log_probs.exp_()
    logit_grads.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=logit_grads.dtype))
    if tanh_logits is not None:
        logit_grads *= tanh_logits.square_().neg_().add_(1)
    if head.multiplier != 1.0:
        logit_grads *= head.multiplier
    return losses, logit_grads
