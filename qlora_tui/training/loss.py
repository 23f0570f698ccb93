"""Cross-entropy of the tokens in the loss only, computed through the output head in chunks.

The stock loss needs logits for every token, in fp32, and their gradient, which are often the largest item in
memory. Here prompt tokens have no logits. The tokens in the loss go through the head one chunk at a time,
with a few rows of the chunk in fp32. The gradient of a chunk overwrites its logits, so no tensor as wide as
the vocabulary outlives the chunk. Liger's kernel can replace the chunks (:mod:`qlora_tui.training.liger`).

Methods that compare answers need the loss of each token, and weight it by a function of the answers' log
probabilities. The gradient of a token's loss with respect to its hidden state does not depend on that weight.
So the forward pass computes this gradient too, and the backward pass only scales it: each token goes through
the head once.

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
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora_tui.memory.execution import LOSS_BLOCK_ROWS, LOSS_CHUNK_ROWS
from qlora_tui.training.embeddings import TokenRows, active_rows, active_weight, add_gradient
from qlora_tui.training.fused.cpu_attention import pad_tokens
from qlora_tui.training.packed_attention import segment_mask


@dataclass(frozen=True)
class ChunkedHead:
    """The computation from the last hidden state to logits, in the forms that are supported."""

    projection: nn.Linear
    multiplier: float
    """Factor applied to the logits: Granite's 1 / ``logits_scaling``, Cohere's ``logit_scale``."""
    softcap: float | None
    """Gemma's ``final_logit_softcapping``: logits become softcap · tanh(logits / softcap)."""


def empty_gradient(states: Tensor) -> Tensor:
    """Allocate the gradient with respect to ``states`` (tokens, hidden), which is kept until the backward.

    In fp16 the gradient would vanish, so it is fp32 until the backward applies the loss scale.
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
    """Compute the loss of each token: logits one chunk at a time, and losses one block of a chunk at a time.

    Args:
        states: (tokens, hidden), the input of the head.
        targets: (tokens,), token ids.
        head: the output head.
        ids: (rows,), token ids whose rows of the head are replaced by ``values``.
        values: (rows, hidden).
        grad: receives the gradient with respect to ``states``, (tokens, hidden). If it is None, no gradients
            are computed.
        on_block: called with the range of tokens, their losses (block, 1), and the gradients with respect to
            their logits (block, vocabulary), which it may change in place. The gradients are None without
            ``grad``.
        on_rows: called with the range of tokens, the gradients with respect to the logits of the replaced
            rows (chunk, rows), and the chunk of ``states`` in the dtype of the head. Not called without
            ``grad`` or ``values``.
        matrix: (vocabulary, hidden), used in place of the head's own weight, and in the same dtype.
        on_chunk: called with the gradients with respect to the logits of a chunk (chunk, vocabulary) and the
            chunk of ``states``, both in the dtype of the head. Not called without ``grad``.
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
        # The padding rows are carried along unread, which avoids a copy without them.
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
            # Otherwise this tensor would stay in memory together with that of the next block.
            del logit_grads
        if grad is not None:
            on_chunk(logits, chunk)
            grad_chunk = (padded_logits @ weight)[: len(chunk)]
            if row_logit_grads is not None and rows is not None:
                on_rows(slice(start, end), row_logit_grads, chunk)
                grad_chunk.addmm_(row_logit_grads.to(rows.dtype), rows)
            grad[start:end] = grad_chunk
            del grad_chunk
        # Otherwise these tensors would stay in memory together with those of the next chunk.
        del logits, padded_logits, row_logit_grads


def block_rows(device: torch.device) -> int:
    """Return the number of rows of a chunk that are in fp32 at a time."""
    return LOSS_BLOCK_ROWS["cuda" if device.type == "cuda" else "cpu"]


def losses_and_grads(
    logits: Tensor, targets: Tensor, head: ChunkedHead, *, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return cross-entropy and its gradient with respect to ``logits``. The head's multiplier and soft cap
    are applied here.

    Args:
        logits: (rows, vocabulary), the output of the projection.
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


IGNORED = -100
"""Label of a token that is not in the loss."""
_GRADIENT_ROWS = 4096
"""Number of rows of a trained LM head whose gradient is computed at a time."""
LossSumFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Computes the summed cross-entropy, fp32, of states (tokens, hidden) for targets (tokens,)."""


def chunks_obstacle(model: Any) -> str:
    """Return why a model's class does not allow chunks of logits; empty if it does."""
    projection = model.get_output_embeddings()
    if type(projection) is not nn.Linear:
        return f"its head is a {type(projection).__name__}"
    return "its decoder cannot be run without its head" if model.get_decoder() in (model, projection) else ""


def find_head(model: nn.Module) -> ChunkedHead | str:
    """Return the output head of a causal language model, or the reason why chunks are not supported.

    The family's computation between head and loss is read from its configuration.
    :func:`qlora_tui.training.checks.base.head_matches_model` verifies that nothing is missing.
    """
    projection: Any = model.get_output_embeddings()  # type: ignore[operator]  # a PreTrainedModel's method
    if obstacle := chunks_obstacle(model):
        return obstacle
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


def use_loss(model: nn.Module, head: ChunkedHead | str, kernel: LossSumFn | None = None) -> None:
    """Replace the model's forward with one that computes our losses and isolates packed samples.

    * ``model(segments=[3, 1])`` isolates samples of these lengths in one sequence
      (:func:`~qlora_tui.training.packed_attention.segment_mask`), with labels or without.
    * ``model(labels=…, num_items_in_batch=…)`` returns the sum of the losses, each times its token's weight
      in ``loss_weights`` if there are any, divided by the number of items.
    * ``model(labels=…, loss_positions=…, per_token=True)`` returns the loss of each token, fp32 (tokens in
      the loss,).

    Apart from ``segments``, calls without labels behave as in the library.

    Args:
        head: the output head, or why chunks are not supported: the library's logits are then used.
        kernel: a loss, such as the result of :func:`qlora_tui.training.liger.verified_liger_loss`, that is
            used in place of the chunks if tokens have no weights and the head is not trained.
    """
    library_forward = model.forward
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]  # a PreTrainedModel's method

    @wraps(library_forward)
    def forward(
        self: nn.Module,
        *,
        segments: list[int] | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_weights: Tensor | None = None,
        loss_positions: Tensor | None = None,
        per_token: bool = False,
        **inputs: Any,
    ) -> Any:
        if segments is not None:
            inputs |= {"attention_mask": segment_mask(segments), "use_cache": False}
        if labels is None:
            return library_forward(**inputs)
        if per_token:
            assert loss_positions is not None
            each = each_token_loss(self, head, inputs, labels, loss_positions, library_forward)
            return CausalLMOutputWithPast(loss=each)
        if isinstance(head, str):
            logits = library_forward(**inputs).logits
            loss = stock_loss(logits, labels, num_items_in_batch, loss_weights)
            return CausalLMOutputWithPast(loss=loss, logits=logits)
        hidden = decoder(**(inputs | {"use_cache": False}))[0]
        module = self.get_output_embeddings()  # type: ignore[operator]  # a PreTrainedModel's method
        rows, matrix = active_rows(module), active_weight(module)
        total, trained = summed_loss(head, hidden, labels, loss_weights, rows, kernel, loss_positions, matrix)
        items = trained if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / items)

    model.forward = MethodType(forward, model)


def stock_loss(
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    loss_weights: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of all logits, as transformers' ``ForCausalLMLoss`` computes it.

    The model's own loss is not used, because some classes expect shifted labels (BART's decoder), and others
    add terms.

    Args:
        logits: (batch, tokens, vocabulary); position t - 1 predicts token t.
        labels: (batch, tokens), ``IGNORED`` for tokens that are not in the loss.
        num_items_in_batch: divisor of the sum. None divides by the number of tokens in the loss or, with
            ``loss_weights``, returns the sum itself.
        loss_weights: (batch, tokens); None if each token counts 1.
    """
    targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous().view(-1)
    rows = logits.float().view(-1, logits.shape[-1])
    targets = targets.to(rows.device)
    if loss_weights is not None:
        each = nn.functional.cross_entropy(rows, targets, ignore_index=IGNORED, reduction="none")
        weights = nn.functional.pad(loss_weights, (0, 1))[..., 1:].reshape(-1)
        return (each * weights).sum() / (1 if num_items_in_batch is None else num_items_in_batch)
    if num_items_in_batch is None:
        return nn.functional.cross_entropy(rows, targets, ignore_index=IGNORED)
    total = nn.functional.cross_entropy(rows, targets, ignore_index=IGNORED, reduction="sum")
    return total / num_items_in_batch


def use_reference_loss(model: nn.Module) -> None:
    """Make the model compute its loss from the library's logits again.

    Packed samples, loss weights and the loss of each token keep working.
    """
    vars(model).pop("forward", None)
    use_loss(model, "the library's own loss is used")


def each_token_loss(
    model: Any,
    head: ChunkedHead | str,
    inputs: dict[str, Any],
    labels: Tensor,
    positions: Tensor,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """Return the cross-entropy of each token in the loss, fp32 (tokens,), in nats.

    Args:
        model: a causal language model without adapter wrapper; its layers may be adapted.
        head: its output head, or why chunks are not supported.
        inputs: arguments of its decoder.
        labels: (batch, tokens).
        positions: the result of :func:`loss_positions` for ``labels``.
        forward: computes logits if chunks are not supported; None uses the model.
    """
    positions = positions.to(labels.device)
    targets = labels.flatten().index_select(0, positions + 1)
    if isinstance(head, str):
        logits = (forward or model)(**inputs).logits.flatten(0, 1).index_select(0, positions)
        return nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    hidden = model.get_decoder()(**(inputs | {"use_cache": False}))[0]
    rows = active_rows(model.get_output_embeddings())
    ids, values = (None, None) if rows is None else (rows.ids, rows.values)
    return token_losses(select_states(hidden, positions), targets, head, ids, values)


def loss_positions(labels: Tensor) -> Tensor:
    """Return the positions from which tokens in the loss are predicted: (tokens in the loss,), int64.

    Positions index the flattened ``labels`` (batch, tokens); the predicted token is one position later. Call
    this while the labels are on the CPU. On a GPU the CPU would have to wait for the result, because the
    number of positions is not known in advance.
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
    """Return the weighted sum of the losses of all tokens in the loss, and the number of these tokens.

    Args:
        hidden: (batch, tokens, hidden); position t - 1 predicts token t.
        labels: (batch, tokens), ``IGNORED`` for tokens that are not in the loss.
        loss_weights: (batch, tokens); None if each token counts 1.
        token_rows: trained rows that replace those of the head.
        kernel: used if there are neither ``loss_weights`` nor trained weights of the head.
        positions: the result of :func:`loss_positions` for ``labels``. None computes the positions here; if
            ``labels`` are on a GPU, the CPU waits for it.
        matrix: (vocabulary, hidden), fp32: a trained head that replaces the frozen one.

    Returns:
        The sum, an fp32 scalar, and the number of tokens.
    """
    ids, values = (None, None) if token_rows is None else (token_rows.ids, token_rows.values)
    if positions is None:
        positions = loss_positions(labels)
    # A traced model is on the meta device, while its labels are on the CPU.
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
    """Return the hidden states at ``positions`` of :func:`loss_positions`, (tokens in the loss, hidden)."""
    states: Tensor = _SelectRows.apply(hidden.flatten(0, 1), positions.to(hidden.device))  # type: ignore[no-untyped-call]
    return states


class _SelectRows(torch.autograd.Function):
    """``rows[positions]`` for distinct positions, so that the gradient is written instead of summed."""

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
    """Return Σ weight · cross-entropy, an fp32 scalar.

    Args:
        states: (tokens, hidden), the input of the head.
        targets: (tokens,), token ids.
        loss_weights: (tokens,); None if each token counts 1.
        ids: (rows,), token ids whose rows of the head are replaced by ``values``.
        values: (rows, hidden).
        matrix: (vocabulary, hidden), fp32, replaces the head's weight.
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
    """Add to ``total`` what one chunk of tokens contributes to the gradient of a head's weight.

    Args:
        total: (vocabulary, hidden), fp32.
        logit_grads: (tokens, vocabulary).
        chunk: (tokens, hidden), the input of the head, in the dtype of ``logit_grads``.
    """
    if chunk.dtype == total.dtype:
        total.addmm_(logit_grads.t(), chunk)
        return
    # A sum over hundreds of tokens can exceed the largest fp16 number.
    wide = chunk.float() if chunk.dtype == torch.float16 else chunk
    for start in range(0, len(total), _GRADIENT_ROWS):
        columns = logit_grads[:, start : start + _GRADIENT_ROWS].to(wide.dtype)
        total[start : start + _GRADIENT_ROWS] += columns.t() @ wide


def token_losses(
    states: Tensor,
    targets: Tensor,
    head: ChunkedHead,
    ids: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of each token, fp32 (tokens,), in nats.

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
