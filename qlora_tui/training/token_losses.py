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

from qlora_tui.training.chunked_loss import select_states
from qlora_tui.training.head_chunks import ChunkedHead, empty_gradient, pass_through_head
from qlora_tui.training.packed_attention import segment_mask
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
        states = select_states(hidden, positions)
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
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[4]
        grad = empty_gradient(states) if needs_grad else None
        row_grads = None
        if needs_grad and values is not None:
            row_grads = values.new_empty(len(targets), len(values))
        losses = torch.empty(len(targets), dtype=torch.float32, device=states.device)

        def store_block(tokens: slice, block_losses: Tensor, _logit_grads: Tensor | None) -> None:
            losses[tokens] = block_losses[:, 0]

        def store_rows(tokens: slice, row_logit_grads: Tensor, _chunk: Tensor) -> None:
            assert row_grads is not None
            row_grads[tokens] = row_logit_grads

        pass_through_head(states, targets, head, ids, values, grad, store_block, store_rows)
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
