"""Every command there is, by screen; and whether a user's keymap names any that is none."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

from qlora_tui.tui.commands import EVERYWHERE, NAVIGATION, Command
from qlora_tui.tui.screens.by_mode import screen_class

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

Table = tuple[str, tuple[Command, ...]]
"""A heading, and the commands under it."""


def every_command() -> list[Table]:
    """The app's own, then each screen's. Imports the screens that have yet to be: for a thread."""
    from qlora_tui.tui.screens.presets import COMMANDS

    screens = [(go.label, screen_class(go.id.removeprefix("go.")).ACTIONS) for go in NAVIGATION]
    return [("Everywhere", EVERYWHERE), *screens, ("Presets", COMMANDS)]


async def tell_strangers(app: QloraApp) -> None:
    """Say which names in the user's keymap are no commands, once the app is shown."""
    await app.shown.wait()
    for told in await asyncio.to_thread(strangers, app.settings.keymap):
        app.notify(told, severity="warning", timeout=10)


def strangers(names: Iterable[str]) -> list[str]:
    """A sentence for each name in a keymap that no command has."""
    known = [command.id for _, commands in every_command() for command in commands]
    return [_told(name, known) for name in names if name not in known]


def _told(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, 1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"The keymap of config.toml gives a key to {name}, which is no command.{meant} F1 lists them all."
