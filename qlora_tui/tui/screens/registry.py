"""The screens by mode; each is imported when it is first needed."""

from __future__ import annotations

from importlib import import_module

from qlora_tui.tui.screens.base import WorkScreen

SCREENS = {
    "home": "HomeScreen",
    "models": "ModelsScreen",
    "data": "DataScreen",
    "memory": "MemoryScreen",
    "lora": "LoraScreen",
    "train": "TrainScreen",
    "runs": "RunsScreen",
    "chat": "ChatScreen",
}
"""Class of each mode, in the module ``screen`` of the package of that name."""


def screen_class(mode: str) -> type[WorkScreen]:
    """Import and return the class of a screen."""
    module = import_module(f"qlora_tui.tui.screens.{mode}.screen")
    cls: type[WorkScreen] = getattr(module, SCREENS[mode])
    return cls


def make_screen(mode: str) -> WorkScreen:
    """Create a screen."""
    return screen_class(mode)()
