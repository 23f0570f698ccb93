"""Asks for the memory size of a GPU to estimate for, as ``--gpu-gib`` gives it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from qlora_tui.tui.screens.modals.text_prompt import TextPromptScreen

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_TEXT = "Memory of the GPU in GiB, such as 12 or 24. Leave empty to use this machine's. It is not saved."


def ask_gpu_size(app: QloraApp) -> None:
    """Ask, then show every estimate against the answer."""

    def on_result(text: str | None) -> None:
        if text is None:
            return
        size = float(text) if text.strip() else None
        app.settings = msgspec.structs.replace(app.settings, gpu_memory_gib=size)
        app.recipe_changed.publish(app.workbench.recipe)
        app.notify(f"Estimates are for {app.memory_budget.name}.")

    now = app.settings.gpu_memory_gib
    value = "" if now is None else f"{now:g}"
    app.push_screen(TextPromptScreen("Assume another GPU size", _TEXT, value, _validate), on_result)


def _validate(text: str) -> str:
    """Return what is wrong with a typed size, or an empty string."""
    if not text.strip():
        return ""
    try:
        size = float(text)
    except ValueError:
        return "Enter a number of GiB, such as 12."
    return "" if size > 0 and math.isfinite(size) else "It must be above 0."
