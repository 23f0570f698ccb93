"""The screens by the name of their mode; each is imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module

from qlora_tui.tui.screens.base import WorkScreen

SCREENS = {
    "home": "home.screen.HomeScreen",
    "models": "models.screen.ModelsScreen",
    "data": "data.screen.DataScreen",
    "memory": "memory.screen.MemoryScreen",
    "lora": "lora.screen.LoraScreen",
    "train": "train.screen.TrainScreen",
    "runs": "runs.screen.RunsScreen",
    "chat": "chat.screen.ChatScreen",
}
"""Module and class of each mode, below this package."""


def screen_class(mode: str) -> type[WorkScreen]:
    """The class alone: what it can do is known without making one."""
    module, _, name = SCREENS[mode].rpartition(".")
    cls: type[WorkScreen] = getattr(import_module(f"qlora_tui.tui.screens.{module}"), name)
    return cls


def make_screen(mode: str) -> WorkScreen:
    """A new one."""
    return screen_class(mode)()
