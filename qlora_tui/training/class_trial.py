"""What a forward of a model's class on ``meta`` shows, and the shapes of its modules do not.

Nothing has values there, so a trial takes milliseconds. It counts what each layer saves for its backward.
:mod:`qlora_tui.memory` compares that with what its rules say of the modules: if a class computes more than
they know of, the estimate from shapes is that uncertain. :mod:`.description` keeps the outcome.
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
"""Length of the text: as many tokens as most recurrent layers compute at a time."""
_NAME = "qlora_tui_trial"
_USUAL_TENSORS = {"position_ids", "s_aux", "sinks"}
"""What models pass to attention next to queries, keys, values and a mask: positions, and logits of sinks."""
_MASK = {"attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}
_ARGUMENTS: tuple[dict[str, Any], ...] = ({**_MASK, "use_cache": False}, {"use_cache": False}, {})
"""What a model may be called with, in the order of trial: a mask with values, in which nothing is masked, for
classes that look; none for others."""


@dataclass(frozen=True)
class Trial:
    """What a forward has shown."""

    saved_bytes: tuple[int, ...]
    """What each layer saves for its backward, in 16 bits and without adapters; empty if the forward needs
    values of tensors."""
    layer_runs: tuple[int, ...]
    """How often it ran each layer; empty if every layer ran once, or it needs values."""
    attends: bool
    """Whether it called transformers' interface for attention."""
    own_code: bool
    """Whether it passed more tensors to attention than usual, or needs values of tensors."""


def try_class(model: Any, layers: Mapping[str, nn.Module]) -> Trial:
    """Run a forward as in training, with an attention function that only this calls.

    Args:
        model: on ``meta``, to be thrown away afterwards.
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
    """One forward of a model, and what was seen in it."""

    def __init__(self, model: Any, layers: Mapping[str, nn.Module]) -> None:
        self.runs: Counter[str] = Counter()
        self.saved_bytes: Counter[str] = Counter()
        self.given: list[set[str]] = []
        """Names of the tensors that each call was given in addition to queries, keys and values."""
        self._model = model
        self._layer = ""
        self._storages: dict[int, Any] = {}
        """By their addresses, which are used again once a storage is freed."""
        AttentionInterface.register(_NAME, self._attend)
        AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
        set_attention(model, _NAME)
        model.get_input_embeddings().register_forward_hook(_with_gradient)
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda *_, name=name: self._begin(name))
            layer.register_forward_hook(lambda *_: self._begin(""))

    def runs_with(self, arguments: Mapping[str, Any]) -> bool:
        """Run it with these arguments; return whether it ran to its end."""
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
        # Not in a layer that runs without gradients, of which nothing is kept.
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
    """Return the embeddings with a gradient; no leaf, which classes could not change in place."""
    return output.detach().requires_grad_().clone()


class _Attention(torch.autograd.Function):
    """A kernel that saves queries, keys, values, its output and one number per row instead of the scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, _ = query.shape
        output = query.new_empty((batch, tokens, heads, value.shape[-1]))
        row_sums = query.new_empty((batch, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, row_sums)
        return output
