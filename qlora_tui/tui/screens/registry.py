"""Every screen, declared once: modes, keys of numbered screens, help and palette follow from it.

A screen that opens over the others also has a command in ``tui.commands`` and an action in ``tui.app``.

A screen's class and commands are imported when they are first needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_tui.tui.commands import Command
    from qlora_tui.tui.screens.base import WorkScreen


@dataclass(frozen=True)
class ScreenEntry:
    """One screen."""

    name: str
    """Its package here, its mode in the app, and the first part of the ids of its commands."""
    class_name: str
    """Its class, in the module ``screen`` of the package."""
    label: str
    help: str
    """What opening it is for."""
    is_modal: bool = False
    """Whether it opens over any screen, and has no mode and no digit."""

    @property
    def open_command(self) -> str:
        """Id of the command that opens it."""
        return f"app.{self.name}" if self.is_modal else f"go.{self.name}"


PRESETS = ScreenEntry(
    "presets", "PresetsScreen", "Presets", "Open a preset, or save this recipe as one.", is_modal=True
)
SETTINGS = ScreenEntry(
    "settings", "SettingsScreen", "Settings", "Change theme, notifications and folders.", is_modal=True
)
NUMBERED_SCREENS = (
    ScreenEntry("home", "HomeScreen", "Home", "Show the GPU, the runs and the next step."),
    ScreenEntry("models", "ModelsScreen", "Model", "Select a model on this machine, or find one on the Hub."),
    ScreenEntry("data", "DataScreen", "Data", "Select data and see every token as the model will."),
    ScreenEntry("memory", "MemoryScreen", "Memory", "See whether the recipe fits in memory, item by item."),
    ScreenEntry("lora", "LoraScreen", "LoRA", "Select the modules to train, and their rank."),
    ScreenEntry("train", "TrainScreen", "Train", "Launch a run, or watch the active one."),
    ScreenEntry("runs", "RunsScreen", "Runs", "See every run so far, and the queue."),
    ScreenEntry("chat", "ChatScreen", "Chat", "Chat with an adapter and its base model side by side."),
)
"""The numbered screens, in the order of their keys, from 0."""
SCREENS = (*NUMBERED_SCREENS, PRESETS, SETTINGS)


def make_screen(mode: str) -> WorkScreen:
    """Import a screen's class and create the screen."""
    (entry,) = (entry for entry in NUMBERED_SCREENS if entry.name == mode)
    module = import_module(f"qlora_tui.tui.screens.{mode}.screen")
    screen: WorkScreen = getattr(module, entry.class_name)()
    return screen


def screen_commands(name: str) -> tuple[Command, ...]:
    """The commands of a screen, without importing the screen."""
    commands: tuple[Command, ...] = import_module(f"qlora_tui.tui.screens.{name}.commands").COMMANDS
    return commands
