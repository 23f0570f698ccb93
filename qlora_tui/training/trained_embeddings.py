"""Trains the whole input embedding and output head besides LoRA (``lora.train_embeddings``).

For continued pretraining on plain text: a new language or domain moves the rows of many tokens. Both are
trained as copies in peft's format (``modules_to_save``), as one matrix where the head is tied. The copies are
in fp32, like the matrices of LoRA, and compute in the dtype of the model, which peft's own would not.

Their gradients are added where they are computed, in :func:`add_gradient` and :func:`add_row_gradients`:
autograd would allocate the whole matrix for the few rows of a batch, and again to sum those of a tied head.
Hooks on the gradient, such as those of distributed training, do not see them.

Shapes with a vocabulary of 49,152 and a hidden size of 576::

    weight     (49152, 576)   fp32, of the embedding, and of a head that is not tied
    embedded   (1, 1000, 576) in the dtype of the model: rows are looked up in fp32, then cast
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Training
from qlora_tui.training.fused.patching import patch_forward

RATE_SHARE = 0.1
"""Rate of embedding and head as a share of that of LoRA where the recipe names none. Unsloth recommends a
half to a tenth, and has 5e-6 beside 5e-5 in its example (docs.unsloth.ai/basics/continued-pretraining)."""
_ADAPTER = "default"


def peft_options(model: Any) -> dict[str, Any]:
    """peft's options that train embedding and head of a bare model. Raises UserError where it cannot."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear or _has_bias(head):
        raise _unsupported_model(
            "its embedding is not an nn.Embedding, or its head not an nn.Linear without bias"
        )
    names = {module: name for name, module in model.named_modules()}
    tied = head.weight is embedding.weight
    return {"modules_to_save": [names[embedding], names[head]], "ensure_weight_tying": tied}


def use_fp32_copies(model: Any, *, tied: bool) -> None:
    """Train peft's copies of embedding and head in fp32, computing in the dtype of the model.

    Args:
        model: the bare model, with an adapter of :func:`peft_options`.
        tied: whether the model has one matrix for both.

    Raises:
        UserError: peft did not keep a tied head tied.
    """
    wrappers = model.get_input_embeddings(), model.get_output_embeddings()
    if not all(isinstance(wrapper, _wrapper_type()) for wrapper in wrappers):
        raise _unsupported_model("peft does not copy both")
    copies = [wrapper.modules_to_save[_ADAPTER] for wrapper in wrappers]
    if (copies[0].weight is copies[1].weight) != tied:
        raise _unsupported_model("peft does not recognize that its head is tied to its embedding")
    dtype = copies[0].weight.dtype
    for wrapper, module in zip(wrappers, copies, strict=True):
        module.weight.data = module.weight.data.float()
        _compute_in(module, dtype)
        wrapper.active_trained_weight = partial(_active_weight, wrapper)


def active_weight(module: Any) -> nn.Parameter | None:
    """The trained matrix (vocabulary, hidden) of embedding or head; None without one, or while it is off."""
    find = getattr(module, "active_trained_weight", None)
    return find() if find else None


def trained_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained matrices of embedding and head, a tied one once; empty where they are frozen."""
    weights = (active_weight(m) for m in model.modules() if "active_trained_weight" in vars(m))
    return list(dict.fromkeys(weight for weight in weights if weight is not None))


def embedding_rate(training: Training) -> float:
    """Peak learning rate of embedding and head."""
    return training.embedding_learning_rate or training.learning_rate * RATE_SHARE


def add_gradient(weight: Tensor, gradient: Tensor) -> None:
    """Add ``gradient``, which is then the caller's no more, to that of ``weight``; both of one shape."""
    if weight.grad is None:
        weight.grad = gradient
    else:
        weight.grad += gradient


def add_row_gradients(weight: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Add the gradients of rows to that of ``weight``, in the same order at each run.

    The rows of each token are summed before, because a GPU would add them in any order.

    Args:
        weight: (vocabulary, hidden), fp32.
        ids: (tokens,), which row each is of; with repetitions.
        rows: (tokens, hidden), fp32.
    """
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    in_order, order = ids.sort(stable=True)
    place = torch.cat([torch.zeros_like(ids[:1]), (in_order[1:] != in_order[:-1]).long()]).cumsum(0)
    # Places that no token has get a sum of zero, for row 0.
    sums = torch.ops.aten.embedding_dense_backward(rows[order], place, len(ids), -1, False)
    weight.grad.index_add_(0, torch.zeros_like(ids).scatter_(0, place, in_order), sums)


class _TrainedLookup(torch.autograd.Function):
    """An embedding lookup, ids (…) to (…, hidden), which adds the gradient to the weight itself."""

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
    """Make a module with an fp32 weight compute in ``dtype``; an embedding casts the rows it looks up.

    That of an embedding can be switched to a reference, whose gradient autograd computes.
    """

    def with_cast_weight(self: Any, x: Tensor) -> Tensor:
        own = self.weight
        if type(self) is nn.Embedding:  # the same, without a copy of the matrix
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
        looked_up: Tensor = _TrainedLookup.apply(x, self.weight, dtype, scale, self.padding_idx)  # type: ignore[no-untyped-call]  # torch's own
        return looked_up

    vars(module)["forward"] = MethodType(with_cast_weight, module)
    if isinstance(module, nn.Embedding):
        patch_forward(module, with_cast_rows, "embeddings")


def _has_bias(head: Any) -> bool:
    return head.bias is not None


def _wrapper_type() -> Any:
    # Imported here, because peft takes seconds to load and a base model alone does not need it.
    from peft.utils.other import ModulesToSaveWrapper

    return ModulesToSaveWrapper


def _unsupported_model(why: str) -> UserError:
    return UserError(
        "Embedding and head of this model cannot be trained",
        what=f"lora.train_embeddings is on, but {why}.",
        fix="Set lora.train_embeddings = false: LoRA on every linear layer learns from plain text too.",
    )
