"""Runs a forward of a model's class on ``meta`` to find facts that its modules' shapes do not show.

Nothing has values on ``meta``, so a trial takes milliseconds. It counts the bytes that each layer saves for
its backward. :mod:`qlora_tui.memory` compares this count with its own rules for the modules: a difference
shows how uncertain the estimate from shapes is. :mod:`.description` stores the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AttentionMaskInterface

from qlora_tui.training.packed_attention import set_attention

TOKENS = 64
"""Length of the text: the number of tokens that most recurrent layers compute at a time."""
_NAME = "qlora_tui_trial"
_USUAL_TENSORS = {"position_ids", "s_aux", "sinks"}
"""Tensors that models pass to attention besides queries, keys, values and mask."""
_MASK = {"attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}
_ARGUMENTS: tuple[dict[str, Any], ...] = ({**_MASK, "use_cache": False}, {"use_cache": False}, {})
"""Arguments to call a model with, in the order in which they are tried.

The first include a mask with values, in which nothing is masked, for classes that read the mask. The second
lack the mask. The last are empty.
"""


@dataclass(frozen=True)
class Trial:
    """The results of a forward."""

    saved_bytes: tuple[int, ...]
    """Bytes that each layer saves for its backward, in 16 bits and without adapters.

    Empty if the forward needs values of tensors.
    """
    layer_runs: tuple[int, ...]
    """Number of times that each layer ran. Empty if every layer ran once, or if the forward failed because
    it needs the values of tensors.
    """
    attends: bool
    """Whether the forward called transformers' attention interface."""
    own_code: bool
    """Whether the model passed unusual tensors to attention, or needs values of tensors."""


def try_class(model: Any, layers: Mapping[str, nn.Module]) -> Trial:
    """Run a forward as in training, with an attention function that no other code uses.

    Args:
        model: on ``meta``; it is changed and must be discarded.
        layers: its decoder layers by name, in order.
    """
    model.requires_grad_(False)
    forward = _Forward(model, layers)
    is_done = any(forward.runs_with(arguments) for arguments in _ARGUMENTS)
    runs = tuple(forward.runs[name] for name in layers)
    unusual = any(names - _USUAL_TENSORS for names in forward.given)
    return Trial(
        saved_bytes=tuple(forward.saved_bytes[name] for name in layers) if is_done else (),
        layer_runs=runs if is_done and max(runs, default=0) > 1 else (),
        attends=bool(forward.given),
        own_code=not is_done or unusual,
    )


class _Forward:
    """One forward of a model, and the observations made during it."""

    def __init__(self, model: Any, layers: Mapping[str, nn.Module]) -> None:
        self.runs: Counter[str] = Counter()
        self.saved_bytes: Counter[str] = Counter()
        self.given: list[set[str]] = []
        """Names of the tensors that each attention call received besides queries, keys and values."""
        self._model = model
        self._layer = ""
        self._storages: dict[int, Any] = {}
        """Storages that are not counted again, keyed by address; kept alive so that no address is reused."""
        AttentionInterface.register(_NAME, self._attend)
        AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
        set_attention(model, _NAME)
        model.get_input_embeddings().register_forward_hook(_with_gradient)
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda *_, name=name: self._begin(name))
            layer.register_forward_hook(lambda *_: self._begin(""))

    def runs_with(self, arguments: Mapping[str, Any]) -> bool:
        """Run the forward with these arguments; return whether it completed."""
        self.runs.clear()
        self.saved_bytes.clear()
        self.given.clear()
        weights = (*self._model.parameters(), *self._model.buffers())
        self._storages = {each.untyped_storage()._cdata: each for each in weights}
        ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
        try:
            with saved_tensors_hooks(self._save, lambda tensor: tensor):
                self._model(input_ids=ids, **arguments)
        except Exception:
            return False
        return True

    def _begin(self, name: str) -> None:
        self._layer = name
        # Except in a layer that runs without gradients, of which nothing is saved.
        self.runs[name] += torch.is_grad_enabled()

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" and storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage
            self.saved_bytes[self._layer] += storage.nbytes()
        return tensor

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        tensors = {"attention_mask": mask[0] if mask else None, **kwargs}
        self.given.append({name for name, each in tensors.items() if isinstance(each, Tensor)})
        return _Attention.apply(query, key, value), None  # type: ignore[no-untyped-call]


def _with_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Return embeddings that require a gradient but are no leaf, because a class may change them in place."""
    return output.detach().requires_grad_().clone()


class _Attention(torch.autograd.Function):
    """Stand-in for a kernel that saves queries, keys, values, output and a number per row, but not scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, _ = query.shape
        output = query.new_empty((batch, tokens, heads, value.shape[-1]))
        row_sums = query.new_empty((batch, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, row_sums)
        return output
