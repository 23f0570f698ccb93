"""Cross-entropy over the trained tokens only, through the head in chunks.

The stock loss makes a row of the vocabulary's width for every token, in fp32, and its gradient beside it:
often the largest item of all. Here prompt tokens make none, and the rest pass a chunk at a time, a few rows
of it in fp32; a chunk's gradient takes the place of its logits, so nothing vocabulary-wide outlives it.
Liger's kernel may take the place of the chunks (:mod:`qlora_tui.training.liger`).
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
from qlora_tui.training.packed_attention import segment_mask
from qlora_tui.training.padding import pad_tokens
from qlora_tui.training.trainable_tokens import TokenRows, active_rows

IGNORED = -100
"""Label of a token nothing is learnt from."""
LossSumFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""The sum of the losses of states (tokens, hidden) against targets (tokens), fp32."""


@dataclass(frozen=True)
class OutputHead:
    """From the last hidden state to logits, in the forms that are known."""

    projection: nn.Linear
    multiplier: float
    """Granite's 1 / ``logits_scaling``, Cohere's ``logit_scale``."""
    softcap: float | None
    """Gemma's ``final_logit_softcapping``: logits become softcap · tanh(logits / softcap)."""


def find_head(model: nn.Module) -> OutputHead | str:
    """The head of a causal language model, or why it cannot be taken in chunks.

    What a family does between head and loss is read from the names its configuration uses; whether that is
    all is for :func:`qlora_tui.training.equivalence_checks.head_matches_model` to prove.
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
    return OutputHead(projection, multiplier, getattr(config, "final_logit_softcapping", None))


def use_chunked_loss(model: nn.Module, head: OutputHead, kernel: LossSumFn | None = None) -> None:
    """Let ``model(labels=…)`` compute its loss in chunks. Without labels it does what it always did.

    ``kernel`` (:func:`qlora_tui.training.liger.verified_liger_loss`) takes their place where it can.
    """
    stock = model.forward
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]  # a PreTrainedModel's method

    @wraps(stock)
    def forward(
        self: nn.Module,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return stock(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
            )
        hidden = decoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )[0]
        rows = active_rows(self.get_output_embeddings())  # type: ignore[operator]  # a PreTrainedModel's method
        total, trained = summed_loss(head, hidden, labels, loss_weights, rows, kernel)
        items = trained if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / items)

    model.forward = MethodType(forward, model)


def use_weighted_loss(model: nn.Module) -> None:
    """Let ``model(loss_weights=…)`` weigh the loss of each token, where it cannot be taken in chunks."""
    stock = model.forward

    @wraps(stock)
    def forward(self: nn.Module, loss_weights: Tensor | None = None, **kwargs: Any) -> Any:
        if loss_weights is None:
            return stock(**kwargs)
        wanted, items = kwargs.pop("labels")[:, 1:], kwargs.pop("num_items_in_batch")
        logits = stock(**kwargs).logits
        losses = nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
        )
        return CausalLMOutputWithPast(loss=(losses * loss_weights[:, 1:]).sum() / items, logits=logits)

    model.forward = MethodType(forward, model)


def use_library_loss(model: nn.Module, *, by_mask: bool) -> None:
    """Undo :func:`use_chunked_loss`: the model's own loss, in packed rows and with weighted tokens too."""
    vars(model).pop("forward", None)
    use_weighted_loss(model)
    use_segments(model, by_mask=by_mask)


def use_segments(model: nn.Module, *, by_mask: bool) -> None:
    """Let ``model(segments=[…])`` keep the samples of a row apart, for either loss.

    ``by_mask``: for :mod:`qlora_tui.training.packed_attention`; flash kernels see it in the positions.
    """
    inner = model.forward

    @wraps(inner)
    def forward(self: nn.Module, segments: list[int] | None = None, **kwargs: Any) -> Any:
        if segments is not None:
            kwargs |= {"attention_mask": segment_mask(segments) if by_mask else None, "use_cache": False}
        return inner(**kwargs)

    model.forward = MethodType(forward, model)


def summed_loss(
    head: OutputHead,
    hidden: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    rows: TokenRows | None = None,
    kernel: LossSumFn | None = None,
) -> tuple[Tensor, int]:
    """The sum of the losses of all trained tokens, fp32, each by its weight, and how many they are.

    ``hidden`` is (batch, tokens, width), ``labels`` and ``weights`` are (batch, tokens): token t is predicted
    from t - 1. ``rows`` stand in place of the head's own. ``kernel`` knows of neither weights nor rows.
    """
    ids, values = (None, None) if rows is None else (rows.ids, rows.values)
    wanted = labels[:, 1:]
    # Counted out once: for how many they are, a card has to be waited for.
    trained = (wanted != IGNORED).nonzero(as_tuple=True)
    states, targets = hidden[:, :-1][trained], wanted[trained]
    if not len(targets):
        nothing = hidden.sum() * 0.0
        return nothing if values is None else nothing + values.sum() * 0.0, 0
    if kernel is not None and weights is None and rows is None:
        return kernel(states, targets), len(targets)
    counts = None if weights is None else weights[:, 1:][trained]
    if values is not None and not torch.is_grad_enabled():
        values = values.detach()
    return chunked_sum(states, targets, head, counts, ids, values), len(targets)


def chunked_sum(
    states: Tensor,
    targets: Tensor,
    head: OutputHead,
    weights: Tensor | None = None,
    ids: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Σ weight · cross-entropy of states (tokens, hidden) against targets (tokens), fp32.

    ``ids`` (rows,) and ``values`` (rows, hidden): the rows of the head that are others.
    """
    total: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]  # torch's own
        states, targets, head, weights, ids, values
    )
    return total


class _ChunkedLoss(torch.autograd.Function):
    """:func:`chunked_sum`; the gradient is made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        targets: Tensor,
        head: OutputHead,
        weights: Tensor | None,
        ids: Tensor | None,
        values: Tensor | None,
    ) -> Tensor:
        weight, bias = head.projection.weight, head.projection.bias
        rows = None if values is None else values.to(weight.dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[5]
        # Gradients of fp16 states are kept in fp32 until the loss scale has been applied: they would vanish.
        grad_dtype = torch.float32 if states.dtype == torch.float16 else states.dtype
        grad = torch.empty(states.shape, dtype=grad_dtype, device=states.device) if needs_grad else None
        grad_rows = torch.zeros_like(values) if needs_grad and values is not None else None
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        block = block_rows(states.device)
        for start in range(0, len(targets), LOSS_CHUNK_ROWS):
            end = start + LOSS_CHUNK_ROWS
            chunk, target = states[start:end].to(weight.dtype), targets[start:end, None]
            counts = None if weights is None else weights[start:end, None]
            with torch.autocast(states.device.type, enabled=False):
                padded_logits = nn.functional.linear(pad_tokens(chunk), weight, bias)
            # What was filled up goes along unread, and no copy is made without it.
            logits = padded_logits[: len(chunk)]
            if ids is not None and rows is not None:
                logits.index_copy_(1, ids, chunk @ rows.t())
            row_logit_grads = (
                None if grad_rows is None or ids is None else grad_rows.new_empty(len(chunk), len(ids))
            )
            for at in range(0, len(chunk), block):
                block_slice = slice(at, at + block)
                losses, logit_grads = losses_and_grads(
                    logits[block_slice], target[block_slice], head, needs_grad=grad is not None
                )
                if counts is not None:
                    losses *= counts[block_slice]
                total += losses.sum()
                if logit_grads is None:
                    continue
                if counts is not None:
                    logit_grads *= counts[block_slice]
                if ids is not None and row_logit_grads is not None:
                    row_logit_grads[block_slice] = logit_grads.index_select(1, ids)
                    logit_grads.index_fill_(1, ids, 0)
                logits[block_slice] = logit_grads
                # Or it would live on beside the next block's.
                del logit_grads
            if grad is not None:
                grad_chunk = (padded_logits @ weight)[: len(chunk)]
                if row_logit_grads is not None and grad_rows is not None and rows is not None:
                    grad_rows.addmm_(row_logit_grads.t(), chunk.to(row_logit_grads.dtype))
                    grad_chunk.addmm_(row_logit_grads.to(rows.dtype), rows)
                grad[start:end] = grad_chunk
                del grad_chunk
            # Or they would live on beside the next chunk's.
            del logits, padded_logits, row_logit_grads
        if grad is not None:
            ctx.save_for_backward(grad, grad_rows)
        ctx.dtype = states.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_rows = ctx.saved_tensors
        rows = None if grad_rows is None else grad_rows * grad_outputs[0]
        return (grad * grad_outputs[0]).to(ctx.dtype), None, None, None, None, rows


def block_rows(device: torch.device) -> int:
    """Rows of a chunk that are in float32 at a time."""
    return LOSS_BLOCK_ROWS["cuda" if device.type == "cuda" else "cpu"]


def losses_and_grads(
    logits: Tensor, targets: Tensor, head: OutputHead, *, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of some rows (rows, vocabulary) of the head's own logits, against (rows, 1), and the
    gradient of each towards its logits, in their shape. Both are fp32."""
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
