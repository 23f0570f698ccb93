"""Where our training step leaves the library's, as switches: each path can be ours or the library's."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal, TypeAlias

from qlora_tui.training import load, loss
from qlora_tui.training.base import Base
from qlora_tui.training.lean.replace import PARTS, Part, ReplacedForwards

Path: TypeAlias = Literal["packed attention", "loss"] | Part
DESCRIPTIONS: dict[Path, str] = {
    "packed attention": "attention over packed samples",
    "loss": "the chunked loss",
    "norms": "the fused RMSNorm",
    "mlp": "the fused gated MLP",
    "lora": "the fused LoRA layers",
    "token rows": "the trained token rows",
}
"""What a user reads of each."""


class FastPaths:
    """The paths that a model with its adapter uses, each of which can be switched."""

    def __init__(self, model: Any, base: Base) -> None:
        """``model``: the base's model with its adapter."""
        self._switches: dict[Path, tuple[Callable[[], object], Callable[[], object]]] = {}
        """To ours, and to the library's."""
        bare = base.model
        if base.kept_apart:
            self._switches["packed attention"] = (
                partial(load.attend_by, bare, bare.config._attn_implementation),
                partial(load.attend_by, bare, base.library_attention),
            )
        if not base.loss.startswith("stock"):
            self._switches["loss"] = (
                partial(vars(bare).__setitem__, "forward", vars(bare)["forward"]),
                partial(loss.use_library_loss, bare, by_mask=base.attends == "segments"),
            )
        for part in PARTS:
            replaced = ReplacedForwards(model, part)
            if len(replaced):
                self._switches[part] = (replaced.use_ours, replaced.use_library)

    @property
    def names(self) -> tuple[Path, ...]:
        """All of them, in the order in which they are tried."""
        return tuple(self._switches)

    def use(self, names: Collection[Path]) -> None:
        """Compute by these, and by the library otherwise."""
        for name, (ours, library) in self._switches.items():
            if name in names:
                ours()
            else:
                library()
