"""Putting a forward of our own in place of a module's, and the library's back."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, Literal, TypeAlias

from torch import nn

Part: TypeAlias = Literal["lora", "mlp", "norms"]
"""Kinds of modules that are replaced together."""
PARTS: tuple[Part, ...] = ("lora", "mlp", "norms")


def replace_forward(module: nn.Module, forward: Callable[..., Any], part: Part) -> None:
    """Let ``module`` compute by ``forward(module, …)`` until :func:`restore_forwards`."""
    forward.part = part  # type: ignore[attr-defined]
    forward.before = vars(module).get("forward")  # type: ignore[attr-defined]
    vars(module)["forward"] = MethodType(forward, module)


def restore_forwards(model: nn.Module, part: Part) -> int:
    """Give every module of ``model`` that ``part`` replaced its former forward; how many they were."""
    restored = 0
    for module in model.modules():
        own = vars(module)
        if getattr(own.get("forward"), "part", None) != part:
            continue
        before = own.pop("forward").before
        if before is not None:
            own["forward"] = before
        restored += 1
    return restored
