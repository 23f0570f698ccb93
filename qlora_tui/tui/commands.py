"""One declaration a command: its key, its line in the footer, the palette and the help screen.

A screen lists its commands in ``SCREEN_COMMANDS`` (Textual has another ``COMMANDS``, for the palette);
:class:`~qlora_tui.tui.screens.base.WorkScreen` turns them into bindings. A user's keymap names them by
``id``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from textual.binding import Binding

from qlora_tui.tui.screens.registry import NUMBERED_SCREENS, PRESETS, SETTINGS


@dataclass(frozen=True, kw_only=True)
class Command:
    """Something the user can do."""

    id: str
    """``train.stop``: unique, and stable for keymaps."""
    key: str
    """The key in Textual's notation; several are separated by commas."""
    action: str
    """The Textual action it runs."""
    label: str
    """The label in the footer: one or two words."""
    help: str
    """A sentence, for the palette and the help screen."""
    in_footer: bool = True
    cli_command: str = ""
    """The command of the command line that does the same, such as ``runs rename``."""

    def binding(self) -> Binding:
        """Convert to a Textual binding."""
        return Binding(self.key, self.action, self.label, show=self.in_footer, tooltip=self.help, id=self.id)

    def keys(self, keymap: Mapping[str, str]) -> list[str]:
        """The keys from the user's keymap, or else the default ones."""
        return keymap.get(self.id, self.key).split(",")


@dataclass(frozen=True)
class ScreenCommands:
    """Declares the commands of one screen: ``ScreenCommands("train")("stop", "s", "stop", "Stop", "…")``."""

    screen: str
    """The mode of the screen, and the first part of each id."""
    in_footer: bool = True
    """Whether the footer shows these commands."""

    def __call__(
        self, name: str, key: str, action: str, label: str, help: str, *, cli_command: str = ""
    ) -> Command:
        return Command(
            id=f"{self.screen}.{name}",
            key=key,
            action=action,
            label=label,
            help=help,
            in_footer=self.in_footer,
            cli_command=cli_command,
        )


NAVIGATION: tuple[Command, ...] = tuple(
    Command(
        id=entry.open_command,
        key=str(number),
        action=f"app.go('{entry.name}')",
        label=entry.label,
        help=entry.help,
        in_footer=False,
    )
    for number, entry in enumerate(NUMBERED_SCREENS)
)
"""The numbered screens."""

FOLDER_COMMAND = (
    "folder",
    "O",
    "folder",
    "Open folder",
    "Open the run's folder; over SSH, copy the command that goes there.",
)
"""The command of screens that show a run: id, key, action, label and help."""

EVERYWHERE: tuple[Command, ...] = (
    *NAVIGATION,
    Command(
        id="app.palette",
        key="ctrl+p",
        action="app.command_palette",
        label="Palette",
        help="Find any command by name.",
    ),
    Command(
        id="app.help",
        key="question_mark",
        action="app.help",
        label="Help",
        help="Show the keys of this screen and explain its terms.",
    ),
    Command(
        id="app.keys",
        key="f1",
        action="app.keys",
        label="All keys",
        help="Show every key of every screen, and the name to change it by in config.toml.",
        in_footer=False,
    ),
    Command(
        id=PRESETS.open_command,
        key="p",
        action="app.presets",
        label=PRESETS.label,
        help=PRESETS.help,
        in_footer=False,
        cli_command="presets",
    ),
    Command(
        id="app.undo",
        key="u",
        action="app.undo",
        label="Undo",
        help="Undo the last change to the recipe.",
        in_footer=False,
    ),
    Command(
        id="app.redo",
        key="ctrl+r",
        action="app.redo",
        label="Redo",
        help="Redo the change that was undone.",
        in_footer=False,
    ),
    Command(
        id=SETTINGS.open_command,
        key="f6",
        action="app.settings",
        label=SETTINGS.label,
        help=SETTINGS.help,
        in_footer=False,
    ),
    Command(
        id="app.assume_gpu",
        key="f3",
        action="app.assume_gpu",
        label="Assume GPU size",
        help="Show estimates and fits for a GPU with another memory size, as --gpu-gib does.",
        in_footer=False,
    ),
    Command(
        id="app.check_machine",
        key="f4",
        action="app.check_machine",
        label="Check this machine",
        help="Test GPU, disks, file locks and libraries, and suggest fixes.",
        in_footer=False,
        cli_command="doctor",
    ),
    Command(
        id="app.repaint",
        key="ctrl+l",
        action="app.repaint",
        label="Repaint",
        help="Redraw the screen.",
        in_footer=False,
    ),
    Command(
        id="app.dismiss",
        key="escape",
        action="app.dismiss_notifications",
        label="Clear notifications",
        help="Dismiss notifications.",
        in_footer=False,
    ),
    Command(
        id="app.suspend",
        key="ctrl+z",
        action="app.suspend_process",
        label="Suspend",
        help="Suspend the app. The shell command fg resumes it.",
        in_footer=False,
    ),
    Command(
        id="app.quit",
        key="q",
        action="app.quit",
        label="Quit",
        help="Quit the app. Runs continue without it.",
        in_footer=False,
    ),
)
"""Commands of the app itself, on every screen."""

FORMER_IDS: Mapping[str, str] = {
    "app.clear_notes": "app.dismiss",
    "chat.left": "chat.left_adapter",
    "chat.right": "chat.next_adapter",
    "chat.voice": "chat.adapter",
    "data.back": "data.previous_problem",
    "data.mend": "data.fix",
    "runs.undelete": "runs.restore",
    "train.rate": "train.learning_rate",
    "train.remedy": "train.fix",
}
"""Ids that released versions had, and what they are now: a keymap with them still works."""


def with_current_ids(keymap: Mapping[str, str]) -> dict[str, str]:
    """Replace former ids of commands by the present ones; where a keymap has both, the present one counts."""
    return {FORMER_IDS.get(name, name): keys for name, keys in keymap.items()} | {
        name: keys for name, keys in keymap.items() if name not in FORMER_IDS
    }
