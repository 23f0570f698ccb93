"""Trains the embedding and the head in addition to LoRA, completely or only some rows; adds NEFTune's noise.

**Rows** (``lora.trainable_tokens``), for tokens that the base model never learned. To read a token, the model
needs its row of the embedding; to write it, its row of the head. Both rows are trained, as a single row if
the head is tied. peft supports this (``trainable_token_indices``) and loads such adapters. But peft rebuilds
both matrices in each forward and computes the gradients of the complete matrices. Here only the rows are
computed, in peft's modules and so in peft's format.

**Complete matrices** (``lora.train_embeddings``), for continued pretraining on plain text: a new language or
domain changes the rows of many tokens. Both matrices are trained as copies in peft's format
(``modules_to_save``), as one copy if the head is tied. Unlike the copies that peft makes, they are in fp32,
like the matrices of LoRA; they compute in the dtype of the model. Their gradients are accumulated where they
are computed, in :func:`add_gradient` and :func:`add_row_gradients`. Autograd would allocate a complete matrix
for the few rows of a batch, and a second one to sum the gradients of a tied head. Gradient hooks, such as
those of distributed training, are not called for these copies.

Shapes with a vocabulary of 49,152 and a hidden size of 576::

    weight     (49152, 576)   fp32, of the embedding, and of a head that is not tied
    embedded   (1, 1000, 576) in the dtype of the model: rows are looked up in fp32, then cast
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_tui.data.trainable_tokens import UNTRAINED_NORM_RATIO
from qlora_tui.errors import UserError
from qlora_tui.recipe.training_settings import Training
from qlora_tui.training.fused.patching import patch_forward

_ROWS, _WHOLE = "TrainableTokensWrapper", "ModulesToSaveWrapper"
"""Names of peft's wrapper classes for modules with some trained rows, and for modules trained whole."""


class EmbeddingNoise:
    """NEFTune: uniform noise on a model's embeddings (Jain et al. 2023, arXiv 2310.05914).

    Noise is added only inside :meth:`scaled_for`, so answers, evaluations and the checks before the first
    step have none. The noise is drawn from torch's random number generator. Checkpoints save its state, so a
    resumed run draws the same noise.

    Args:
        model: the model to train, with or without its adapter.
        alpha: the noise of a sample of L tokens of width H is uniform within ± alpha / √(L·H) (section 3).
    """

    def __init__(self, model: Any, alpha: float) -> None:
        self._alpha = alpha
        self._magnitude: Tensor | None = None
        """alpha / √L for each sequence or token, broadcast to (sequences, tokens, 1); None: no noise."""
        if alpha:
            model.get_input_embeddings().register_forward_hook(self._add)

    @contextmanager
    def scaled_for(self, batch: dict[str, Any]) -> Iterator[None]:
        """Add noise scaled for the lengths of these samples (:func:`qlora_tui.training.batches.collate`)."""
        if self._alpha:
            self._magnitude = self._alpha / _lengths(batch).float().sqrt()
        try:
            yield
        finally:
            self._magnitude = None

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self._magnitude is None:
            return None
        magnitude = (self._magnitude / output.shape[-1] ** 0.5).to(output.dtype)
        return output + torch.empty_like(output).uniform_(-1, 1).mul_(magnitude)


def _lengths(batch: dict[str, Any]) -> Tensor:
    """Return sample lengths, for each token (1, tokens, 1) or for each padded sequence (sequences, 1, 1)."""
    if "segments" not in batch:
        padded: Tensor = batch["attention_mask"].sum(1)[:, None, None]
        return padded
    lengths = torch.tensor(batch["segments"])
    of_tokens = lengths.repeat_interleave(lengths)[None, :, None]
    return of_tokens.to(batch["input_ids"].device, non_blocking=True)


@dataclass(frozen=True)
class TokenRows:
    """Replacements of some rows of a matrix (vocabulary, width)."""

    ids: Tensor
    """(rows,): ids of the replaced tokens."""
    values: Tensor
    """(rows, width): their replacement rows."""


def token_indices(model: Any, ids: Sequence[int]) -> list[int] | dict[str, list[int]]:
    """Return peft's ``trainable_token_indices`` for rows ``ids`` of embedding and head.

    Raises UserError if peft does not support the embedding or head, or if a token has no row.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # peft would drop the bias of a head.
    if (
        not isinstance(embedding, nn.Embedding)
        or not isinstance(head, nn.Linear)
        or getattr(head, "bias", None) is not None
    ):
        raise _unsupported_tokens("peft does not support token rows for its type of embedding or head")
    if max(ids) >= (vocabulary_size := len(embedding.weight)):
        raise _unsupported_tokens(f"token {max(ids)} is beyond the {vocabulary_size:,} rows of its embedding")
    if head.weight is embedding.weight:
        return list(ids)
    names = {module: name for name, module in model.named_modules()}
    return {names[embedding]: list(ids), names[head]: list(ids)}


def init_untrained_rows(model: Any) -> None:
    """Initialize untrained rows, whose norm is near zero, with the mean of all rows.

    The RMSNorm of a row near zero has a slope in the hundreds, so its gradient would dominate all others, and
    Adam would remember it for a thousand steps. Raises UserError if peft did not add the rows to the head.
    """
    if not _is_peft(model.get_output_embeddings(), _ROWS):
        raise _unsupported_tokens("peft does not recognize that its head is tied to its embedding")
    for wrapper in row_wrappers(model):
        weight, rows = wrapper.original_module.weight, rows_of(wrapper, "default")
        sizes = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        faint = sizes[rows.ids] < UNTRAINED_NORM_RATIO * sizes.median()
        mean = weight.mean(dim=0, dtype=torch.float32)
        with torch.no_grad():
            rows.values.copy_(torch.where(faint[:, None], mean, rows.values))


def use_trained_rows(model: nn.Module) -> None:
    """Make every module with trained rows keep its frozen matrix and compute these rows separately."""
    for wrapper in row_wrappers(model):
        _patch_forward(wrapper)


def row_wrappers(model: nn.Module) -> Iterator[Any]:
    """Return peft's wrappers of the embedding and head if some of their rows are trained."""
    return (module for module in model.modules() if _is_peft(module, _ROWS))


def rows_of(wrapper: Any, adapter: str) -> TokenRows:
    """Return the trained rows of an adapter in this module."""
    token_adapter = wrapper.token_adapter
    values = token_adapter.trainable_tokens_delta[adapter]
    return TokenRows(torch.tensor(token_adapter.token_indices[adapter], device=values.device), values)


def active_rows(module: Any) -> TokenRows | None:
    """Return the active adapter's rows in a module patched by ``use_trained_rows``; None without any."""
    known = getattr(module, "active_token_rows", None)
    return known() if known else None


def with_rows(base: nn.Module, x: Tensor, rows: TokenRows | None) -> Tensor:
    """Return the output of embedding or head ``base`` for ``x``, with ``rows`` in place of its own rows."""
    if rows is None:
        plain: Tensor = base(x)
        return plain
    if isinstance(base, nn.Embedding):
        embedded: Tensor = _Lookup.apply(x, rows.values, rows.ids, base)  # type: ignore[no-untyped-call]
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

    A one-hot matrix with few columns maps positions to rows. An index list would need ``nonzero``, which
    waits for the GPU.
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


def _is_peft(module: Any, name: str) -> bool:
    """Return whether a module is of the class of peft with this name."""
    # Compared by name, because importing peft takes seconds and a base model alone does not need it.
    from peft.utils import other

    return isinstance(module, getattr(other, name))


def _unsupported_tokens(why: str) -> UserError:
    return UserError(
        "Trainable tokens are not supported for this model",
        what=f"lora.trainable_tokens is set, but {why}.",
        fix="Leave lora.trainable_tokens empty and use a template without such tokens: "
        'model.chat_template = "alpaca" or "plain".',
    )


RATE_SHARE = 0.1
"""Learning rate of embedding and head as a share of LoRA's, if the recipe sets none.

Unsloth recommends a half to a tenth, and uses 5e-6 with 5e-5 in its example
(docs.unsloth.ai/basics/continued-pretraining).
"""
_ADAPTER = "default"


def peft_options(model: Any) -> dict[str, Any]:
    """Return peft's options for training the embedding and head of a model without adapters. Raises UserError
    if the model does not support this.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if (
        not isinstance(embedding, nn.Embedding)
        or type(head) is not nn.Linear
        or getattr(head, "bias", None) is not None
    ):
        raise _unsupported_model(
            "its embedding is not an nn.Embedding, or its head not an nn.Linear without bias"
        )
    names = {module: name for name, module in model.named_modules()}
    tied = head.weight is embedding.weight
    return {"modules_to_save": [names[embedding], names[head]], "ensure_weight_tying": tied}


def use_fp32_copies(model: Any, *, tied: bool) -> None:
    """Convert peft's copies of embedding and head to fp32, and make them compute in the dtype of the model.

    Args:
        model: the bare model, with an adapter made with :func:`peft_options`.
        tied: whether the model has one matrix for both.

    Raises:
        UserError: peft did not copy both, or did not keep a tied head tied.
    """
    wrappers = model.get_input_embeddings(), model.get_output_embeddings()
    if not all(_is_peft(wrapper, _WHOLE) for wrapper in wrappers):
        raise _unsupported_model("peft does not copy both embedding and head")
    copies = [wrapper.modules_to_save[_ADAPTER] for wrapper in wrappers]
    if (copies[0].weight is copies[1].weight) != tied:
        raise _unsupported_model("peft does not recognize that its head is tied to its embedding")
    dtype = copies[0].weight.dtype
    for wrapper, module in zip(wrappers, copies, strict=True):
        module.weight.data = module.weight.data.float()
        _compute_in(module, dtype)
        wrapper.active_trained_weight = partial(_active_weight, wrapper)


def active_weight(module: Any) -> nn.Parameter | None:
    """Return the trained matrix (vocabulary, hidden) of embedding or head; None without an active one."""
    find = getattr(module, "active_trained_weight", None)
    return find() if find else None


def trained_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained matrices of embedding and head, a tied matrix once; empty if they are frozen."""
    weights = (active_weight(m) for m in model.modules() if "active_trained_weight" in vars(m))
    return list(dict.fromkeys(weight for weight in weights if weight is not None))


def embedding_rate(training: Training) -> float:
    """Return the peak learning rate of embedding and head."""
    return training.embedding_learning_rate or training.learning_rate * RATE_SHARE


def add_gradient(weight: Tensor, gradient: Tensor) -> None:
    """Add ``gradient`` to ``weight.grad``, in the same shape. The caller must not use ``gradient`` again."""
    if weight.grad is None:
        weight.grad = gradient
    else:
        weight.grad += gradient


def add_row_gradients(weight: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Add the gradients of rows to the gradient of ``weight``, in the same order in every run.

    The rows of each token are summed first, because a GPU would add them in any order.

    Args:
        weight: (vocabulary, hidden), fp32.
        ids: (tokens,), the row to which each gradient belongs, with repetitions.
        rows: (tokens, hidden), fp32.
    """
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    in_order, order = ids.sort(stable=True)
    place = torch.cat([torch.zeros_like(ids[:1]), (in_order[1:] != in_order[:-1]).long()]).cumsum(0)
    # Unused entries have a sum of zero, which is added to row 0.
    sums = torch.ops.aten.embedding_dense_backward(rows[order], place, len(ids), -1, False)
    weight.grad.index_add_(0, torch.zeros_like(ids).scatter_(0, place, in_order), sums)


class _TrainedLookup(torch.autograd.Function):
    """An embedding lookup, ids (…) to (…, hidden). Its backward itself adds to the gradient of the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        dtype: torch.dtype,
        scale: Tensor | float | None,
        padding_idx: int | None,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.scale, ctx.padding_idx = weight, scale, padding_idx
        rows = functional.embedding(x, weight).to(dtype)
        return rows if scale is None else rows * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        (x,) = ctx.saved_tensors
        ids, grad = x.flatten(), grad_outputs[0].flatten(0, -2)
        if ctx.scale is not None:
            grad = grad * ctx.scale
        if ctx.padding_idx is not None:
            grad = grad.masked_fill((ids == ctx.padding_idx)[:, None], 0)
        add_row_gradients(ctx.weight, ids, grad.to(ctx.weight.dtype))
        return (None,) * 5


def _active_weight(wrapper: Any) -> nn.Parameter | None:
    if wrapper.disable_adapters or _ADAPTER not in wrapper.active_adapters:
        return None
    weight: nn.Parameter = wrapper.modules_to_save[_ADAPTER].weight
    return weight


def _compute_in(module: Any, dtype: torch.dtype) -> None:
    """Make a module with an fp32 weight compute in ``dtype``. An embedding casts only the rows that it looks
    up.

    The forward of an embedding can be switched to a reference, whose gradient autograd computes.
    """

    def with_cast_weight(self: Any, x: Tensor) -> Tensor:
        own = self.weight
        if type(self) is nn.Embedding:  # the same result, without a copy of the matrix
            looked_up: Tensor = type(self).forward(self, x).to(dtype)
            return looked_up
        self._parameters["weight"] = own.to(dtype)
        try:
            result: Tensor = type(self).forward(self, x)
        finally:
            self._parameters["weight"] = own
        return result

    def with_cast_rows(self: Any, x: Tensor) -> Tensor:
        # Gemma's embedding scales its output.
        scale = getattr(self, "embed_scale", None)
        if isinstance(scale, Tensor):
            scale = scale.to(dtype)
        looked_up: Tensor = _TrainedLookup.apply(x, self.weight, dtype, scale, self.padding_idx)  # type: ignore[no-untyped-call]
        return looked_up

    vars(module)["forward"] = MethodType(with_cast_weight, module)
    if isinstance(module, nn.Embedding):
        patch_forward(module, with_cast_rows, "embeddings")


def _unsupported_model(why: str) -> UserError:
    return UserError(
        "This model's embedding and head cannot be trained",
        what=f"lora.train_embeddings is on, but {why}.",
        fix="Set lora.train_embeddings = false. LoRA on every linear layer can also learn from plain text.",
    )
