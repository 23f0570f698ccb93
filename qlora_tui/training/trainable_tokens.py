"""Trains rows of embedding and head besides LoRA, for tokens that the base model never learned.

To read a token the model needs its row of the embedding, to write it its row of the head. Both are trained,
as one row where the head is tied. peft supports this (``trainable_token_indices``) and loads such adapters,
but rebuilds both matrices in each forward and computes their whole gradients. Here only the rows are
computed, in peft's modules and so in its format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_tui.data.trainable_tokens import UNTRAINED_NORM_RATIO
from qlora_tui.errors import UserError
from qlora_tui.training.fused.patching import patch_forward


@dataclass(frozen=True)
class TokenRows:
    """Replacements of some rows of a matrix (vocabulary, width)."""

    ids: Tensor
    """(rows,): the token ids that are replaced."""
    values: Tensor
    """(rows, width): their rows."""


def token_indices(model: Any, ids: Sequence[int]) -> list[int] | dict[str, list[int]]:
    """peft's ``trainable_token_indices`` for rows ``ids`` of embedding and head. Raises UserError."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # peft would drop the bias of a head.
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear) or _has_bias(head):
        raise _unsupported_model("peft does not support token rows for its type of embedding or head")
    if max(ids) >= (vocabulary_size := len(embedding.weight)):
        raise _unsupported_model(f"token {max(ids)} is beyond the {vocabulary_size:,} rows of its embedding")
    if head.weight is embedding.weight:
        return list(ids)
    names = {module: name for name, module in model.named_modules()}
    return {names[embedding]: list(ids), names[head]: list(ids)}


def init_untrained_rows(model: Any) -> None:
    """Initialize untrained rows, whose norm is near zero, with the mean of all rows.

    The RMSNorm of a row near zero has a slope in the hundreds: its gradient would dominate all others, and
    Adam would remember it for a thousand steps. Raises UserError where peft did not add the rows to the head.
    """
    if not isinstance(model.get_output_embeddings(), _wrapper_type()):
        raise _unsupported_model("peft does not recognize that its head is tied to its embedding")
    for wrapper in row_wrappers(model):
        weight, rows = wrapper.original_module.weight, rows_of(wrapper, "default")
        sizes = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        faint = sizes[rows.ids] < UNTRAINED_NORM_RATIO * sizes.median()
        mean = weight.mean(dim=0, dtype=torch.float32)
        with torch.no_grad():
            rows.values.copy_(torch.where(faint[:, None], mean, rows.values))


def use_trained_rows(model: nn.Module) -> None:
    """Make every module with trained rows compute only these rows in addition to its frozen matrix."""
    for wrapper in row_wrappers(model):
        _patch_forward(wrapper)


def row_wrappers(model: nn.Module) -> Iterator[Any]:
    """peft's modules around embedding and head."""
    return (module for module in model.modules() if isinstance(module, _wrapper_type()))


def rows_of(wrapper: Any, adapter: str) -> TokenRows:
    """The trained rows of an adapter in this module."""
    token_adapter = wrapper.token_adapter
    values = token_adapter.trainable_tokens_delta[adapter]
    return TokenRows(torch.tensor(token_adapter.token_indices[adapter], device=values.device), values)


def active_rows(module: Any) -> TokenRows | None:
    """The rows of the active adapter, in a module that ``use_trained_rows`` has patched; None without any."""
    known = getattr(module, "active_token_rows", None)
    return known() if known else None


def with_rows(base: nn.Module, x: Tensor, rows: TokenRows | None) -> Tensor:
    """The output of embedding or head ``base`` for ``x``, with these rows in place of its own."""
    if rows is None:
        plain: Tensor = base(x)
        return plain
    if isinstance(base, nn.Embedding):
        embedded: Tensor = _Lookup.apply(x, rows.values, rows.ids, base)  # type: ignore[no-untyped-call]  # torch's own
        return embedded
    scores: Tensor = base(x)
    own = functional.linear(x, rows.values.to(x.dtype))
    return scores.index_copy_(-1, rows.ids, own.to(scores.dtype))


def _patch_forward(wrapper: Any) -> None:
    known = {name: rows_of(wrapper, name) for name in wrapper.token_adapter.trainable_tokens_delta}

    def active_token_rows() -> TokenRows | None:
        if wrapper.disable_adapters or wrapper.token_adapter.merged:
            return None
        return next((known[name] for name in wrapper.active_adapters if name in known), None)

    def forward(self: Any, x: Tensor) -> Tensor:
        return with_rows(self.original_module, x, active_token_rows())

    wrapper.active_token_rows = active_token_rows
    patch_forward(wrapper, forward, "token rows")


class _Lookup(torch.autograd.Function):
    """An embedding lookup with some rows replaced: ids (…) to (…, width).

    Which position is which row is a one-hot matrix of few columns. An index list would need ``nonzero``,
    which waits for the GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, ids: Tensor, base: nn.Embedding) -> Tensor:
        out: Tensor = base(x)
        where = x.reshape(-1, 1) == ids
        # Gemma's embedding scales its output.
        scale = getattr(base, "embed_scale", 1.0)
        if isinstance(scale, Tensor):
            scale = scale.to(out.dtype)
        flat = out.view(-1, out.shape[-1]).masked_fill_(where.any(1, keepdim=True), 0)
        flat.addmm_(where.to(out.dtype), values.to(out.dtype) * scale)
        ctx.save_for_backward(where)
        ctx.scale, ctx.dtype = scale, values.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, None, None]:
        (where,) = ctx.saved_tensors
        grad = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        return None, (where.t().to(grad.dtype) @ grad).to(ctx.dtype) * ctx.scale, None, None


def _has_bias(head: Any) -> bool:
    return head.bias is not None


def _wrapper_type() -> Any:
    # Imported here, because peft takes seconds to load and a base model alone does not need it.
    from peft.utils.other import TrainableTokensWrapper

    return TrainableTokensWrapper


def _unsupported_model(why: str) -> UserError:
    return UserError(
        "Trainable tokens are not supported for this model",
        what=f"lora.trainable_tokens is set, but {why}.",
        fix="Leave lora.trainable_tokens empty and use a template without such tokens: "
        'model.chat_template = "alpaca" or "plain".',
    )
