"""Every command and screen, as declared in ``commands.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from textual.binding import Binding


@dataclass(frozen=True, kw_only=True)
class Command:
    """Something the user can do."""

    id: str
    """Unique id, such as ``train.stop``. An id never changes, because keymaps refer to it."""
    key: str
    """The default key in Textual's notation; several keys are separated by commas."""
    action: str
    """The Textual action that the command runs."""
    label: str
    """Label in the footer: one or two words."""
    help: str
    """One sentence for the palette and the help screen."""
    group: str = ""
    """Heading under which the screen's help lists the command; empty if the screen's commands have no groups.
    """
    footer: bool = True
    """Whether the footer shows the command."""
    ends: bool = False
    """Whether the command stops, removes or closes something. The palette lists such a command after the
    other commands of its screen, so that Enter does not run it by accident.
    """

    def binding(self) -> Binding:
        """Convert to a Textual binding."""
        return Binding(self.key, self.action, self.label, show=self.footer, tooltip=self.help, id=self.id)

    def keys(self, keymap: Mapping[str, str]) -> list[str]:
        """Return the command's keys in Textual's notation: from the user's keymap if it lists the command,
        otherwise the default keys.
        """
        return keymap.get(self.id, self.key).split(",")


@dataclass(frozen=True)
class ScreenEntry:
    """A screen. For example, the class of screen ``data`` is ``DataScreen`` in ``screens/data/screen.py``."""

    name: str
    """Name of the screen's package and of its mode in the app, and the beginning of its commands' ids."""
    opened_by: Command

    @property
    def label(self) -> str:
        """The name that users see."""
        return self.opened_by.label

    @property
    def is_modal(self) -> bool:
        """Whether the screen opens on top of any other screen, and therefore has no mode and no digit."""
        return self not in NUMBERED_SCREENS


def _read() -> dict[str, tuple[Command, ...]]:
    """Return the commands of each section of ``commands.toml``, by the name of the section."""
    sections = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    # The default action is named after the command. In these two sections it is an action of the app; in all
    # others, an action of the section's screen.
    actions = {"go": "app.go('{}')", "app": "app.{}"}
    commands: dict[str, tuple[Command, ...]] = {}
    for section, rows in sections.items():
        group, action = "", actions.get(section, "{}")
        commands[section] = ()
        for name, row in rows.items():
            group = row.get("group", group)
            usual = {"id": f"{section}.{name}", "action": action.format(name)}
            commands[section] += (Command(**{**usual, **row, "group": group}),)
    return commands


_SECTIONS = _read()
EVERYWHERE: tuple[Command, ...] = (*_SECTIONS["go"], *_SECTIONS["app"])
"""Commands of the app itself, available on every screen."""
COMMANDS: Mapping[str, Command] = {
    command.id: command for commands in _SECTIONS.values() for command in commands
}
"""All commands by id."""
NUMBERED_SCREENS = tuple(ScreenEntry(command.id.removeprefix("go."), command) for command in _SECTIONS["go"])
"""The numbered screens in the order of their digits, starting at 0."""
SCREENS = (
    *NUMBERED_SCREENS,
    *(ScreenEntry(name, COMMANDS[f"app.{name}"]) for name in _SECTIONS if f"app.{name}" in COMMANDS),
)
"""All screens; the modals, which open on top of other screens, come last."""


def screen_commands(name: str) -> tuple[Command, ...]:
    """Return the commands of the screen with this name."""
    return _SECTIONS[name]


def by_group(commands: Iterable[Command]) -> list[tuple[str, list[Command]]]:
    """Return (group, commands) pairs, ordered by each group's first occurrence."""
    groups: dict[str, list[Command]] = {}
    for command in commands:
        groups.setdefault(command.group, []).append(command)
    return list(groups.items())


def commands_by_screen() -> list[tuple[str, tuple[Command, ...]]]:
    """Return (heading, commands) pairs: first the app's own commands, then the commands of each screen."""
    return [("Everywhere", EVERYWHERE), *((entry.label, _SECTIONS[entry.name]) for entry in SCREENS)]
