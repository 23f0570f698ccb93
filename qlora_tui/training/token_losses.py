"""The cross-entropy of each token by itself, through the output head in chunks.

Methods that compare answers weight their tokens by what the answers' log-probabilities turn out to be. The
gradient of a token's loss at its hidden state does not depend on that weight, so it is computed in the
forward as in :mod:`~qlora_tui.training.chunked_loss`, and the backward only scales it: the head is passed
once, and no logits outlive their chunk.
"""

from __future__ import annotations

from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora_tui.memory.execution import LOSS_CHUNK_ROWS
from qlora_tui.training import chunked_loss
from qlora_tui.training.chunked_loss import ChunkedHead
from qlora_tui.training.packed_attention import segment_mask
from qlora_tui.training.padding import pad_tokens
from qlora_tui.training.trainable_tokens import active_rows


def use_token_losses(model: nn.Module, head: ChunkedHead | str) -> None:
    """Make ``model(per_token=True, labels=…)`` return the loss of each token, (tokens in the loss,), in fp32.

    Other calls are unchanged. Install it after everything else that replaces the model's forward.

    Args:
        head: the output head, or why chunks are not supported: the model's own logits are then used.
    """
    other_forward = model.forward
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]  # a PreTrainedModel's method

    @wraps(other_forward)
    def forward(self: nn.Module, per_token: bool = False, **kwargs: Any) -> Any:
        if not per_token:
            return other_forward(**kwargs)
        labels: Tensor = kwargs.pop("labels")
        positions = kwargs.pop("loss_positions").to(labels.device)
        targets = labels.flatten().index_select(0, positions + 1)
        if isinstance(head, str):
            logits = other_forward(**kwargs).logits.flatten(0, 1).index_select(0, positions)
            losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
            return CausalLMOutputWithPast(loss=losses)
        if (segments := kwargs.pop("segments", None)) is not None:
            kwargs["attention_mask"] = segment_mask(segments)
        hidden = decoder(**kwargs, use_cache=False)[0]
        rows = active_rows(self.get_output_embeddings())  # type: ignore[operator]  # a PreTrainedModel's method
        ids, values = (None, None) if rows is None else (rows.ids, rows.values)
        states = chunked_loss.select_states(hidden, positions)
        return CausalLMOutputWithPast(loss=token_losses(states, targets, head, ids, values))

    model.forward = MethodType(forward, model)


def token_losses(
    states: Tensor,
    targets: Tensor,
    head: ChunkedHead,
    ids: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each token, fp32 (tokens,), in nats.

    Args:
        states: (tokens, hidden), the input of the head.
        targets: (tokens,), token ids.
        head: the output head.
        ids: (rows,), token ids whose rows of the head are replaced by ``values``.
        values: (rows, hidden).
    """
    losses: Tensor = _TokenLosses.apply(states, targets, head, ids, values)  # type: ignore[no-untyped-call]  # torch's own
    return losses


class _TokenLosses(torch.autograd.Function):
    """The autograd function of :func:`token_losses`, which computes its gradient in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        targets: Tensor,
        head: ChunkedHead,
        ids: Tensor | None,
        values: Tensor | None,
    ) -> Tensor:
        weight, bias = head.projection.weight, head.projection.bias
        rows = None if values is None else values.to(weight.dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[4]
        # In fp16 the gradients would vanish: they stay in fp32 until the backward applies the loss scale.
        grad_dtype = torch.float32 if states.dtype == torch.float16 else states.dtype
        grad = torch.empty(states.shape, dtype=grad_dtype, device=states.device) if needs_grad else None
        row_grads = (
            torch.empty(len(targets), len(ids), device=states.device)
            if needs_grad and ids is not None
            else None
        )
        losses = torch.empty(len(targets), dtype=torch.float32, device=states.device)
        block = chunked_loss.block_rows(states.device)
        for start in range(0, len(targets), LOSS_CHUNK_ROWS):
            end = min(start + LOSS_CHUNK_ROWS, len(targets))
            chunk, target = states[start:end].to(weight.dtype), targets[start:end, None]
            with torch.autocast(states.device.type, enabled=False):
                padded_logits = nn.functional.linear(pad_tokens(chunk), weight, bias)
            logits = padded_logits[: len(chunk)]
            if ids is not None and rows is not None:
                logits.index_copy_(1, ids, chunk @ rows.t())
            for at in range(0, len(chunk), block):
                within = slice(at, min(at + block, len(chunk)))
                overall = slice(start + within.start, start + within.stop)
                block_losses, logit_grads = chunked_loss.losses_and_grads(
                    logits[within], target[within], head, needs_grad=needs_grad
                )
                losses[overall] = block_losses[:, 0]
                if logit_grads is None:
                    continue
                if row_grads is not None and ids is not None:
                    row_grads[overall] = logit_grads.index_select(1, ids)
                    logit_grads.index_fill_(1, ids, 0)
                logits[within] = logit_grads
                # Otherwise it would stay in memory beside that of the next block.
                del logit_grads
            if grad is not None:
                grad_chunk = (padded_logits @ weight)[: len(chunk)]
                if row_grads is not None and rows is not None:
                    grad_chunk.addmm_(row_grads[start:end].to(rows.dtype), rows)
                grad[start:end] = grad_chunk
                del grad_chunk
            # Otherwise they would stay in memory beside those of the next chunk.
            del logits, padded_logits
        if needs_grad:
            ctx.save_for_backward(grad, row_grads, states if row_grads is not None else None)
        ctx.dtype = states.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad, row_grads, states = ctx.saved_tensors
        scale = grad_outputs[0][:, None]
        value_grads = None if row_grads is None else (row_grads * scale).t() @ states.to(row_grads.dtype)
        return (grad * scale).to(ctx.dtype), None, None, None, value_grads
