"""The command palette: commands available now, commands of other screens, runs, models, presets and themes.

Recently used entries come first. A command of another screen acts on what is selected on that screen, so the
palette opens the screen without running the command. Moving the cursor to a theme previews the theme.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from textual.actions import parse
from textual.app import ComposeResult
from textual.binding import Binding
from textual.command import CommandList, CommandPalette, DiscoveryHit, Hit, Hits, Provider
from textual.content import Content
from textual.fuzzy import Matcher
from textual.widget import Widget

from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.commands import EVERYWHERE, SCREENS, Command, screen_commands
from qlora_tui.tui.key_names import bare_key, dialog_keys
from qlora_tui.tui.screens.base import DimsScreenBehind, WorkScreen
from qlora_tui.tui.themes import theme_names
from qlora_tui.tui.ui_state import add_recent, recent, recent_paths
from qlora_tui.tui.widgets.controls import ReversingList

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_OTHER_SCREEN_FACTOR = 0.8
"""Factor by which the scores of other screens' commands are multiplied, so that these commands rank below the
current screen's.
"""
_HELP_SCORE = 0.3
"""Score of an entry if its title does not match the query, but every word of the query is the beginning of a
word in the entry's help.
"""
_WIDTH, _FRAME, _MARGIN = 140, 5, 8
"""Maximum width of the palette, width of its frame and padding, and its margin in a wide window, in cells."""
_NAME_CELLS = 20
"""Width of the column of names, in cells. A longer name moves its description to the right."""
_SHOWN_RECENT = 5
_RECENT_BONUS = 0.2
"""Bonus for recently used entries, as a fraction of the score."""


@dataclass(frozen=True)
class Entry:
    """An entry in the palette."""

    key: str
    """Identifier in the list of recently used entries: ``run:20261130-tickets``, ``command:train.launch``."""
    title: str
    help: str
    use: Callable[[], Awaitable[object] | object]
    shortcut: str = ""
    """Key that runs the entry's command on the command's own screen; empty if the entry is not a command."""
    ends: bool = False
    """Whether selecting the entry stops, removes or closes something (``Command.ends``). False for a
    command of another screen, because selecting it only opens that screen.
    """
    theme: str = ""
    """The theme that this entry selects, previewed while the cursor is on it."""
    factor: float = 1.0
    """Factor by which this entry's score is multiplied. The score ranks the results of a search."""


class _CommandList(CommandList, ReversingList):
    """The palette's list of commands."""


class Palette(CommandPalette, DimsScreenBehind):
    """Textual's palette, framed like a dialog."""

    def compose(self) -> ComposeResult:
        for widget in super().compose():
            yield _CommandList() if isinstance(widget, CommandList) else widget

    def on_mount(self) -> None:
        frame = self.query_one("#--container", Widget)
        frame.add_class("frame")
        frame.styles.width = _width(self.app.size.width)
        frame.border_title = "Commands"
        frame.border_subtitle = dialog_keys([Binding("escape", "escape", "Close")], "Enter run")


def _width(window: int) -> int:
    """Return the width of the palette in a window that is ``window`` cells wide. The palette fills a small
    window, because the screen behind it would show only fragments.
    """
    return window if window < WIDE_CELLS else min(_WIDTH, window - _MARGIN)


class CommandProvider(Provider):
    """Provides the palette's entries: commands, training runs, models, presets and themes."""

    _objects: list[Entry] | None = None

    async def discover(self) -> Hits:
        commands = {entry.key: entry for entry in self._commands_here()}
        keys = recent("palette")[:_SHOWN_RECENT]
        known = dict(commands)
        if any(key not in known for key in keys):
            known |= {entry.key: entry for entry in (*self._commands_elsewhere(), *await self._named())}
        first = {key: known[key] for key in keys if key in known and not known[key].ends}
        for entry in (first | commands).values():
            yield DiscoveryHit(self._line(Content(entry.title), entry), self._use(entry), entry.title)

    async def search(self, query: str) -> Hits:
        matcher, lately = self.matcher(query), recent("palette")
        for entry in (*self._commands_here(), *await self._named(), *self._commands_elsewhere()):
            score = _score(matcher, query, entry)
            if score > 0:
                score *= entry.factor * (1 + _RECENT_BONUS * (entry.key in lately))
                line = self._line(matcher.highlight(entry.title), entry)
                yield Hit(score, line, self._use(entry), entry.title)

    def _line(self, title: Content, entry: Entry) -> Content:
        """Return the entry's name, description and key as one line, as wide as the palette."""
        title = title.pad_right(max(0, _NAME_CELLS - title.cell_length))
        room = _width(self._app.size.width) - _FRAME - title.cell_length - len(entry.shortcut) - 4
        help_ = Content(entry.help).truncate(max(0, room), ellipsis=True, pad=True)
        return Content.assemble(
            title, "  ", help_.stylize("not bold dim"), "  ", (entry.shortcut, "bold $key")
        )

    def _use(self, entry: Entry) -> Callable[[], Awaitable[object]]:
        return partial(_use, entry)

    def _commands_here(self) -> Iterator[Entry]:
        """Yield the commands that are available now. A command that stops or removes something comes after
        the screen's other commands, so that Enter does not run it by accident.
        """
        here = self.screen.SCREEN_COMMANDS if isinstance(self.screen, WorkScreen) else ()
        for command in (*sorted(here, key=lambda command: command.ends), *EVERYWHERE):
            if works(self._app, self.screen, command):
                yield self._entry(command, command, command.help)

    def _commands_elsewhere(self) -> Iterator[Entry]:
        mode = self.screen.MODE if isinstance(self.screen, WorkScreen) else ""
        for screen in SCREENS:
            for command in screen_commands(screen.name) if screen.name != mode else ():
                help_ = f"Opens {screen.label}. {command.help}"
                yield self._entry(command, screen.opened_by, help_, _OTHER_SCREEN_FACTOR)

    def _entry(self, command: Command, runs: Command, help_: str, factor: float = 1) -> Entry:
        screen = cast("WorkScreen", self.screen)
        use = partial(self._app.run_action, runs.action, default_namespace=screen)
        return Entry(
            f"command:{command.id}",
            command.label,
            help_,
            use,
            shortcut=bare_key(command.id),
            ends=command.ends and runs is command,
            factor=factor,
        )

    async def _named(self) -> list[Entry]:
        """Return entries for runs, models, presets and themes, read once each time the palette opens."""
        if self._objects is None:
            self._objects = await asyncio.to_thread(_named_entries, self._app)
        return self._objects

    @property
    def _app(self) -> QloraApp:
        return cast("QloraApp", self.app)


def works(app: QloraApp, screen: object, command: Command) -> bool:
    """Return whether a command is available on ``screen``, the current screen."""
    _, name, parameters = parse(command.action)
    owner = app if command.action.startswith("app.") else cast("WorkScreen", screen)
    return owner.check_action(name, parameters) is True


async def _use(entry: Entry) -> None:
    add_recent("palette", entry.key)
    outcome = entry.use()
    if isinstance(outcome, Awaitable):
        await outcome


def _named_entries(app: QloraApp) -> list[Entry]:
    from qlora_tui.catalog.local_models import list_local_models
    from qlora_tui.recipe.presets import list_presets
    from qlora_tui.runs.directory import all_runs
    from qlora_tui.tui.screens.train.screen import show_run
    from qlora_tui.tui.workbench import open_preset

    folders = [*(Path(folder) for folder in app.settings.model_folders), *recent_paths("models")]
    entries = [
        Entry(
            f"run:{run.id}",
            f"Run: {run.name}",
            "Watch the run, or see its result if it has ended.",
            partial(show_run, app, run),
        )
        for run in all_runs()
    ]
    entries += [
        Entry(
            f"model:{model.id}",
            f"Model: {model.name}",
            "Train this model.",
            partial(_use_model, app, model.id, model.name),
        )
        for model in list_local_models(folders)
        if model.refusal is None
    ]
    entries += [
        Entry(
            f"preset:{preset.name}",
            f"Preset: {preset.name}",
            preset.note or "Apply the settings of this preset; model and data stay the same.",
            partial(open_preset, app, preset.name),
        )
        for preset in list_presets()
        if not preset.problem
    ]
    entries += [
        Entry(
            f"theme:{name}",
            f"Theme: {name}",
            "Use this theme from now on.",
            partial(_use_theme, app, name),
            theme=name,
        )
        for name in theme_names()
    ]
    return entries


def _use_model(app: QloraApp, model_id: str, name: str) -> None:
    from qlora_tui.tui.key_names import key_name

    if app.edit("model.id", model_id):
        app.notify(f"Model set to {name}. Press {key_name('app.undo')} to undo.")


def _use_theme(app: QloraApp, name: str) -> None:
    from qlora_tui.settings import save_setting

    app.try_or_show_error(lambda: app.apply_settings(save_setting("theme", name)))


def previewed_theme(message: CommandPalette.OptionHighlighted) -> str:
    """Return the name of the theme that the highlighted entry selects; empty if it selects no theme."""
    hit = getattr(message.highlighted_event.option, "hit", None)
    command = getattr(hit, "command", None)
    entry = command.args[0] if isinstance(command, partial) and command.args else None
    return entry.theme if isinstance(entry, Entry) else ""


def _score(matcher: Matcher, query: str, entry: Entry) -> float:
    """Return how well an entry matches a query; 0 if it does not match.

    The score depends on the title, in which the letters of the query must occur in order. If the title does
    not match, the entry still matches if every word of the query is the beginning of a word in the entry's
    help. The help is not matched letter by letter: in such a long text, almost any query would match.
    """
    words = entry.help.casefold().split()
    in_help = all(any(word.startswith(part) for word in words) for part in query.casefold().split())
    return matcher.match(entry.title) or (_HELP_SCORE if in_help else 0.0)
