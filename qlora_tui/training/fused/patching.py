"""Replaces the forward methods of modules, and restores those of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal, TypeAlias

from torch import nn

PatchedPart: TypeAlias = Literal["lora", "mlp", "norms", "rotary", "experts", "token rows", "embeddings"]
"""A kind of replaced module; each kind is switched as a whole."""
PATCHED_PARTS: tuple[PatchedPart, ...] = (
    *("norms", "rotary", "mlp", "lora", "experts"),
    *("token rows", "embeddings"),
)


def patch_forward(module: nn.Module, forward: Callable[..., Any], part: PatchedPart) -> None:
    """Replace the forward of ``module`` by ``forward(module, …)``; :class:`PatchedForwards` switches back."""
    forward.part = part  # type: ignore[attr-defined]
    forward.before = vars(module).get("forward")  # type: ignore[attr-defined]
    vars(module)["forward"] = MethodType(forward, module)


class PatchedForwards:
    """The modules of a model whose ``forward`` was replaced for one :data:`PatchedPart`.

    They can be switched between our forward and the library's.
    """

    def __init__(self, model: nn.Module, part: PatchedPart) -> None:
        self._part = part
        replaced = [m for m in model.modules() if getattr(vars(m).get("forward"), "part", None) == part]
        self._ours = {module: vars(module)["forward"].__func__ for module in replaced}

    def __len__(self) -> int:
        return len(self._ours)

    def use_reference(self) -> None:
        """Use the library's forward in each module."""
        for module, forward in self._ours.items():
            vars(module).pop("forward", None)
            if forward.before is not None:
                vars(module)["forward"] = forward.before

    def use_ours(self) -> None:
        """Use the replacement in each module."""
        for module, forward in self._ours.items():
            vars(module)["forward"] = MethodType(forward, module)


@contextmanager
def temporary_forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of each module with a function without ``self`` while the context is open."""
    originals = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in originals.items():
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own
