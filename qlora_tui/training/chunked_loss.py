"""Cross-entropy of the tokens in the loss only, computed through the output head in chunks.

The stock loss needs logits for every token, in fp32, and their gradient: often the largest item in memory.
Here prompt tokens have no logits, and the others pass the head a chunk at a time, a few rows of it in fp32.
The gradient of a chunk overwrites its logits, so nothing as wide as the vocabulary outlives it. Liger's
kernel can replace the chunks (:mod:`qlora_tui.training.liger`).

Shapes for a packed sequence of 1,000 tokens, 600 in the loss, hidden size 576, vocabulary 49,152, on CPU::

    hidden       (1, 1000, 576)     labels (1, 1000)
    states       (600, 576)         hidden states that predict a token in the loss: position t - 1 for token t
    targets      (600,)
    logits       (256, 49152)       of one chunk, in the dtype of the head: 24 MiB instead of 188 MiB in fp32
    logit_grads  (32, 49152)        fp32, of one block; written back into ``logits``
    grad         (600, 576)         logits @ W: the gradient of ``states``, ready before the backward
    weight_grad  (49152, 576)       fp32, of a head that is trained: Σ over the chunks of logitsᵀ @ states
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora_tui.training.head_chunks import ChunkedHead, empty_gradient, pass_through_head
from qlora_tui.training.packed_attention import pass_sample_lengths
from qlora_tui.training.trainable_tokens import TokenRows, active_rows
from qlora_tui.training.trained_embeddings import active_weight, add_gradient

IGNORED = -100
"""Label of a token that is not in the loss."""
_GRADIENT_ROWS = 4096
"""Rows of a trained head whose gradient from one chunk is in memory at a time."""
LossSumFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Computes the summed cross-entropy, fp32, of states (tokens, hidden) against targets (tokens,)."""


def find_head(model: nn.Module) -> ChunkedHead | str:
    """The output head of a causal language model, or the reason why chunks are not supported.

    What a family computes between head and loss is read from its configuration. Whether that is everything is
    verified by :func:`qlora_tui.training.equivalence_checks.head_matches_model`.
    """
    projection = model.get_output_embeddings()  # type: ignore[operator]  # a PreTrainedModel's method
    if type(projection) is not nn.Linear:
        return f"its head is a {type(projection).__name__}"
    if projection.weight.requires_grad or (projection.bias is not None and projection.bias.requires_grad):
        return "its head is trained"
    config: Any = model.config
    config = config.get_text_config()
    multiplier = 1.0
    if scaling := getattr(config, "logits_scaling", None):
        multiplier /= float(scaling)
    if scale := getattr(config, "logit_scale", None):
        multiplier *= float(scale)
    return ChunkedHead(projection, multiplier, getattr(config, "final_logit_softcapping", None))


def use_chunked_loss(model: nn.Module, head: ChunkedHead, kernel: LossSumFn | None = None) -> None:
    """Make ``model(labels=…)`` compute its loss in chunks. Without labels the model is unchanged.

    Args:
        kernel: used in place of the chunks for tokens without weights and heads that are not trained,
            such as :func:`qlora_tui.training.liger.verified_liger_loss`.
    """
    reference_forward = model.forward
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]  # a PreTrainedModel's method

    @wraps(reference_forward)
    def forward(
        self: nn.Module,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_weights: Tensor | None = None,
        loss_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return reference_forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
            )
        hidden = decoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )[0]
        module = self.get_output_embeddings()  # type: ignore[operator]  # a PreTrainedModel's method
        total, trained = summed_loss(
            head,
            hidden,
            labels,
            loss_weights,
            active_rows(module),
            kernel,
            loss_positions,
            active_weight(module),
        )
        items = trained if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / items)

    model.forward = MethodType(forward, model)


def use_weighted_loss(model: nn.Module) -> None:
    """Make ``model(loss_weights=…)`` weight the loss of each token, where chunks are not supported."""
    reference_forward = model.forward

    @wraps(reference_forward)
    def forward(
        self: nn.Module,
        loss_weights: Tensor | None = None,
        loss_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if loss_weights is None:
            return reference_forward(**kwargs)
        wanted, items = kwargs.pop("labels")[:, 1:], kwargs.pop("num_items_in_batch")
        logits = reference_forward(**kwargs).logits
        losses = nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
        )
        return CausalLMOutputWithPast(loss=(losses * loss_weights[:, 1:]).sum() / items, logits=logits)

    model.forward = MethodType(forward, model)


def use_reference_loss(model: nn.Module) -> None:
    """Restore the model's own loss, which then also supports packed samples and loss weights."""
    vars(model).pop("forward", None)
    use_weighted_loss(model)
    pass_sample_lengths(model)


def loss_positions(labels: Tensor) -> Tensor:
    """Where a token in the loss is predicted: (tokens in the loss,), int64.

    Positions count through all of ``labels`` (batch, tokens); the token itself is one further. Found on
    the CPU, where labels are made: a GPU would have to be waited for, because their number is unknown.
    """
    sequences, places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return sequences * labels.shape[1] + places


def summed_loss(
    head: ChunkedHead,
    hidden: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None = None,
    token_rows: TokenRows | None = None,
    kernel: LossSumFn | None = None,
    positions: Tensor | None = None,
    matrix: Tensor | None = None,
) -> tuple[Tensor, int]:
    """The weighted sum of the losses of all tokens in the loss, and the number of these tokens.

    Args:
        hidden: (batch, tokens, hidden); position t - 1 predicts token t.
        labels: (batch, tokens), ``IGNORED`` for tokens that are not in the loss.
        loss_weights: (batch, tokens); None where each token counts 1.
        token_rows: trained rows that replace those of the head.
        kernel: used where there are neither ``loss_weights`` nor trained weights of the head.
        positions: what :func:`loss_positions` finds in ``labels``; None finds it
            here, for which the CPU waits for the GPU.
        matrix: (vocabulary, hidden), fp32: a trained head, in place of the frozen one.

    Returns:
        The sum, an fp32 scalar, and the number of tokens.
    """
    ids, values = (None, None) if token_rows is None else (token_rows.ids, token_rows.values)
    if positions is None:
        positions = loss_positions(labels)
    # A traced model is on the meta device, and its labels are on the CPU.
    states = select_states(hidden, positions)
    targets = labels.flatten().index_select(0, positions + 1)
    if not len(targets):
        nothing = hidden.sum() * 0.0
        for weights in (values, matrix):
            nothing = nothing if weights is None else nothing + weights.sum() * 0.0
        return nothing, 0
    if kernel is not None and loss_weights is None and token_rows is None and matrix is None:
        return kernel(states, targets), len(targets)
    selected_weights = None if loss_weights is None else loss_weights.flatten().index_select(0, positions + 1)
    if not torch.is_grad_enabled():
        values, matrix = (None if weights is None else weights.detach() for weights in (values, matrix))
    return chunked_sum(states, targets, head, selected_weights, ids, values, matrix), len(targets)


def select_states(hidden: Tensor, positions: Tensor) -> Tensor:
    """The hidden states at ``positions`` of :func:`loss_positions`, (tokens in the loss, hidden)."""
    states: Tensor = _SelectRows.apply(hidden.flatten(0, 1), positions.to(hidden.device))  # type: ignore[no-untyped-call]
    return states


class _SelectRows(torch.autograd.Function):
    """``rows[positions]`` for positions that differ, whose gradient is written and not summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.shape = rows.shape
        return rows.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        return grad_outputs[0].new_zeros(ctx.shape).index_copy_(0, positions, grad_outputs[0]), None


def chunked_sum(
    states: Tensor,
    targets: Tensor,
    head: ChunkedHead,
    loss_weights: Tensor | None = None,
    ids: Tensor | None = None,
    values: Tensor | None = None,
    matrix: Tensor | None = None,
) -> Tensor:
    """Σ weight · cross-entropy, an fp32 scalar.

    Args:
        states: (tokens, hidden), the input of the head.
        targets: (tokens,), token ids.
        loss_weights: (tokens,); None where each token counts 1.
        ids: (rows,), token ids whose rows of the head are replaced by ``values``.
        values: (rows, hidden).
        matrix: (vocabulary, hidden), fp32, in place of the head's weight.
    """
    total: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]  # torch's own
        states, targets, head, loss_weights, ids, values, matrix
    )
    return total


class _ChunkedLoss(torch.autograd.Function):
    """The autograd function of :func:`chunked_sum`, which computes its gradient in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        targets: Tensor,
        head: ChunkedHead,
        loss_weights: Tensor | None,
        ids: Tensor | None,
        values: Tensor | None,
        matrix: Tensor | None,
    ) -> Tensor:
        needs_grad = any(ctx.needs_input_grad[place] for place in (0, 5, 6))
        grad = empty_gradient(states) if needs_grad else None
        weight_grad = torch.zeros_like(matrix) if matrix is not None and ctx.needs_input_grad[6] else None
        grad_rows = torch.zeros_like(values) if needs_grad and values is not None else None
        total = torch.zeros((), dtype=torch.float32, device=states.device)

        def sum_block(tokens: slice, losses: Tensor, logit_grads: Tensor | None) -> None:
            if loss_weights is not None:
                losses *= loss_weights[tokens, None]
                if logit_grads is not None:
                    logit_grads *= loss_weights[tokens, None]
            total.add_(losses.sum())

        def sum_rows(tokens: slice, row_logit_grads: Tensor, chunk: Tensor) -> None:
            assert grad_rows is not None
            grad_rows.addmm_(row_logit_grads.t(), chunk.to(row_logit_grads.dtype))

        def sum_weights(logit_grads: Tensor, chunk: Tensor) -> None:
            if weight_grad is not None:
                add_weight_gradient(weight_grad, logit_grads, chunk)

        narrow = None if matrix is None else matrix.to(head.projection.weight.dtype)
        pass_through_head(states, targets, head, ids, values, grad, sum_block, sum_rows, narrow, sum_weights)
        if grad is not None:
            ctx.save_for_backward(grad, grad_rows)
        ctx.matrix, ctx.weight_grad = matrix, weight_grad
        ctx.dtype = states.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_rows = ctx.saved_tensors
        rows = None if grad_rows is None else grad_rows * grad_outputs[0]
        weight_grad, ctx.weight_grad = ctx.weight_grad, None
        if weight_grad is not None:
            # In place: a copy would be as large as the head.
            weight_grad *= grad_outputs[0]
            add_gradient(ctx.matrix, weight_grad)
        return (grad * grad_outputs[0]).to(ctx.dtype), None, None, None, None, rows, None


def add_weight_gradient(total: Tensor, logit_grads: Tensor, chunk: Tensor) -> None:
    """Add the gradient of a head's weight from one chunk of tokens to ``total``.

    Args:
        total: (vocabulary, hidden), fp32.
        logit_grads: (tokens, vocabulary).
        chunk: (tokens, hidden), the input of the head, in the same dtype.
    """
    if chunk.dtype == total.dtype:
        total.addmm_(logit_grads.t(), chunk)
        return
    # A sum over hundreds of tokens can exceed the largest number of fp16.
    wide = chunk.float() if chunk.dtype == torch.float16 else chunk
    for start in range(0, len(total), _GRADIENT_ROWS):
        columns = logit_grads[:, start : start + _GRADIENT_ROWS].to(wide.dtype)
        total[start : start + _GRADIENT_ROWS] += columns.t() @ wide
