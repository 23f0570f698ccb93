"""Switches between our fast paths of a training step and the reference, the code of transformers and peft.

There is one switch for each path.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal, TypeAlias

from qlora_tui.training import chunked_loss, model_loading
from qlora_tui.training.base_model import PreparedBase
from qlora_tui.training.fused.patching import PATCHED_PARTS, PatchedForwards, PatchedPart

FastPath: TypeAlias = Literal["packed attention", "loss"] | PatchedPart
DESCRIPTIONS: dict[FastPath, str] = {
    "packed attention": "attention over packed samples",
    "loss": "the chunked or Liger loss",
    "norms": "the fused RMSNorm",
    "rotary": "the rotary kernel",
    "mlp": "the fused gated MLP",
    "lora": "the fused LoRA layers",
    "experts": "the experts one at a time",
    "token rows": "the trained token rows",
    "embeddings": "the trained embedding",
}
"""Names of the paths in messages."""


class FastPaths:
    """The fast paths that a model with its adapter uses, each of which can be switched."""

    def __init__(self, model: Any, base: PreparedBase) -> None:
        """``model``: the base's model with its adapter."""
        self._switches: dict[FastPath, tuple[Callable[[], object], Callable[[], object]]] = {}
        """For each path, the functions that switch to ours and to the library's."""
        bare = base.model
        if base.padding_free:
            self._switches["packed attention"] = (
                partial(model_loading.set_attention, bare, bare.config._attn_implementation),
                partial(model_loading.set_attention, bare, base.reference_attention),
            )
        if base.loss != "stock":
            self._switches["loss"] = (
                partial(vars(bare).__setitem__, "forward", vars(bare)["forward"]),
                partial(chunked_loss.use_reference_loss, bare),
            )
        for part in PATCHED_PARTS:
            replaced = PatchedForwards(model, part)
            if len(replaced):
                self._switches[part] = (replaced.use_ours, replaced.use_reference)

    @property
    def names(self) -> tuple[FastPath, ...]:
        """All fast paths, in the order in which they are tried."""
        return tuple(self._switches)

    def use(self, names: Collection[FastPath]) -> None:
        """Use these fast paths, and the library's code for all others."""
        for name, (ours, reference) in self._switches.items():
            if name in names:
                ours()
            else:
                reference()
