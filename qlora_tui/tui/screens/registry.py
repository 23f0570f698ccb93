"""The screens by the name of their mode; each is imported when it is first asked for."""

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
    """The class alone: what it can do is known without making one."""
    module = import_module(f"qlora_tui.tui.screens.{mode}.screen")
    cls: type[WorkScreen] = getattr(module, SCREENS[mode])
    return cls


def make_screen(mode: str) -> WorkScreen:
    """A new one."""
    return screen_class(mode)()
