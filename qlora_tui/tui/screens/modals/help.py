"""Help: a page for each screen, with the keys that are available now and the symbols and terms on the screen,
and a page with all keys.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.content import Content

from qlora_tui.formatting import uncapitalize
from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.command_palette import works
from qlora_tui.tui.commands import (
    COMMANDS,
    EVERYWHERE,
    SCREENS,
    Command,
    by_group,
    commands_by_screen,
    screen_commands,
)
from qlora_tui.tui.key_names import bare_key, dialog_keys, highlight_keys, name_keys, short_keys
from qlora_tui.tui.screens.base import Dialog
from qlora_tui.tui.widgets.controls import Drawing, ViScroll

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_KEYMAP_TEXT = (
    "Next to each key is the name of its command. To change a key, add the name to [keymap] in config.toml: "
    '"train.stop" = "x". Write keys as ctrl+x, escape, enter, slash, f2; several as "x,f2".'
)
_HEADING_STYLE = "bold $primary"
_KEY_STYLE = "bold $key"
_BRIEF = ("palette", "keys", "presets", "undo", "redo", "settings", "check_machine", "quit")
"""Names of the app's commands that are on each page of help. The page with all keys has all of the app's
commands.
"""
_Row: TypeAlias = tuple[tuple[str, ...], str]
"""A row of the help: the cells shown at the left, and the sentence that follows them."""
_Table: TypeAlias = tuple[str, Sequence[_Row], str]
"""A table of the help: its heading, its rows, and the style of the first cell of a row."""
_Groups: TypeAlias = Sequence[tuple[str, Sequence[Command]]]
_Part: TypeAlias = Callable[[int], list[Content]]
"""Returns the lines of a part of a page, for a width in cells. The first line is a heading."""
_STATES = {
    "before": "before a run",
    "queued": "while a run waits",
    "starting": "while a run starts",
    "running": "while a run trains",
    "ended": "after a run",
}
"""The states for which a screen has different help, as words in the title of the dialog."""
_FRAME_ROWS = 4
"""Rows of the dialog's border and padding."""
_MAX_SHARE = 0.9
"""Maximum height of the dialog in a wide window, as a share of the window's height."""
_LEAST_SENTENCE = 16
_COLUMN_CELLS = 50
"""Approximate width of each column of a page with two columns, in cells."""


class HelpScreen(Dialog[None]):
    """Dialog with columns of keys and terms, each with a sentence that explains it."""

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark", "dismiss", "Close")]

    def __init__(self, title: str, *columns: Sequence[_Part], stacked: Sequence[_Part] = ()) -> None:
        """Create the dialog.

        Args:
            title: What the help is about.
            columns: The parts of each column.
            stacked: The parts in a window that is too narrow for two columns, if there are two.
        """
        super().__init__()
        self._title = title
        self._columns = columns
        self._stacked = stacked

    def compose(self) -> ComposeResult:
        with ViScroll(classes=f"dialog help-page {'help' if self._stacked else ''}") as dialog:
            dialog.border_title = f"Help: {self._title}"
            dialog.border_subtitle = dialog_keys(self.BINDINGS)
            with Container(id="help-columns"):
                yield from map(self._column, self._columns)
            if self._stacked:
                with Container(id="help-stacked"):
                    yield self._column(self._stacked)

    def _column(self, parts: Sequence[_Part]) -> Drawing:
        """Return a widget that shows all lines of these parts, and that is as tall as these lines."""

        def draw(width: int, height: int) -> list[Content]:
            # In a narrow window, the dialog is as high as the window (``modal.tcss``).
            share = 1 if self.app.size.width < WIDE_CELLS else _MAX_SHARE
            return _paged(parts, width, max(2, int(share * self.app.size.height) - _FRAME_ROWS))

        return Drawing(draw, classes="help-text")

    def on_mount(self) -> None:
        dialog = self.query_one(ViScroll)
        dialog.focus()
        for name in ("scroll_y", "virtual_size", "size"):
            self.watch(dialog, name, self._show_keys_later)

    def _show_keys_later(self) -> None:
        # The sizes of the dialog and of its contents change one after the other.
        self.call_after_refresh(self._show_keys)

    def _show_keys(self) -> None:
        """Show the dialog's keys and, if there are lines below the window, ``↓ more``."""
        dialog = self.query_one(ViScroll)
        more = ["↓ more"] if dialog.scroll_y < dialog.max_scroll_y else []
        dialog.border_subtitle = dialog_keys(self.BINDINGS, *more)


def screen_help(app: QloraApp, name: str, state: str = "") -> HelpScreen:
    """Return the page of help on a screen: the keys that are available now, and the symbols and terms on the
    screen.

    Args:
        app: The app, in which the screen is the current screen.
        name: Name of the screen.
        state: State of the screen, as named in ``help.toml``; empty for the default state.
    """
    entry = next(entry for entry in SCREENS if entry.name == name)
    offered = [each for each in screen_commands(name) if entry.is_modal or works(app, app.screen, each)]
    words = _word_table(words_of(name, state))
    groups = [(heading or "Keys", commands) for heading, commands in by_group(offered)]
    if entry.is_modal:
        return HelpScreen(entry.label, [partial(_lines, [*_key_tables(groups), words])])

    # The terms come last in the second column, and the app's commands last in the shorter column.
    def columns(first: int) -> tuple[list[_Part], list[_Part]]:
        """Return the parts of both columns, without the app's commands. ``first``: number of groups in the
        first column.
        """
        left, right = _key_tables(groups[:first]), [*_key_tables(groups[first:]), words]
        return [partial(_lines, left)], [partial(_lines, right)]

    def heights(first: int) -> tuple[int, int]:
        """Return the approximate heights of both columns, in lines."""
        left, right = columns(first)
        return len(_joined(left, _COLUMN_CELLS)), len(_joined(right, _COLUMN_CELLS))

    last = len(_everywhere(_COLUMN_CELLS)) + 1
    first = min(range(1, len(groups) + 1), key=lambda first: max(*heights(first), min(heights(first)) + last))
    left, right = columns(first)
    stacked = [*left, *right, _everywhere]
    (left if heights(first)[0] < heights(first)[1] else right).append(_everywhere)
    title = f"{entry.label}, {_STATES[state]}" if state in _STATES else entry.label
    return HelpScreen(title, left, right, stacked=stacked)


def all_keys_screen() -> HelpScreen:
    """Return a page with the keys of all screens and the ids of their commands."""
    tables = [partial(_lines, _key_tables([each], with_names=True)) for each in commands_by_screen()]
    return HelpScreen("all keys", [lambda width: highlight_keys(_KEYMAP_TEXT).wrap(width), *tables])


def _joined(parts: Sequence[_Part], width: int) -> list[Content]:
    """Return the lines of all parts, with an empty line between two parts."""
    lines: list[Content] = []
    for part in parts:
        lines += [*([Content("")] if lines else []), *part(width)]
    return lines


def _paged(parts: Sequence[_Part], width: int, rows: int) -> list[Content]:
    """Return the lines of all parts. A heading that would be the last of ``rows`` lines is moved to the next
    page.
    """
    lines: list[Content] = []
    for line in _joined(parts, width):
        follows_gap = bool(lines) and not lines[-1]
        if follows_gap and len(lines) % rows == rows - 1:
            lines.append(Content(""))
        lines.append(line)
    return lines


def words_of(name: str, state: str) -> dict[str, str]:
    """Return the explanation of each symbol and term of a screen in this state, by the symbol or term."""
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    table = tables.get(name, {})
    of_state = table.get(state, {})
    always = {} if state == "empty" else {word: text for word, text in table.items() if isinstance(text, str)}
    return {**of_state, **always}


def _word_table(words: dict[str, str]) -> _Table:
    return "On the screen", [((word,), name_keys(sentence)) for word, sentence in words.items()], "bold"


def _key_tables(groups: _Groups, *, with_names: bool = False) -> list[_Table]:
    """Return a table for each group, with the keys and the help of each command. ``with_names``: whether the
    ids of the commands are included.
    """

    def row(command: Command) -> _Row:
        names = (command.id,) if with_names else ()
        return (short_keys(command.id), *names), _named_help(command)

    return [(heading, list(map(row, commands)), _KEY_STYLE) for heading, commands in groups]


def _named_help(command: Command) -> str:
    """Return the help of a command. If the words of its label in the footer are not in it, the label comes
    first: ``Withdraw: remove the run from the queue.``
    """
    text = command.help.casefold()
    if not command.footer or all(word in text for word in command.label.casefold().split()):
        return command.help
    return f"{command.label}: {uncapitalize(command.help)}"


def _everywhere(width: int) -> list[Content]:
    """Return lines with the keys of the app's commands, each with the label of its command."""
    first, last = EVERYWHERE[0], next(each for each in reversed(EVERYWHERE) if each.id.startswith("go."))
    digits = f"{bare_key(first.id)}–{bare_key(last.id)}"
    items = [(digits, "screens"), *((short_keys(f"app.{n}"), COMMANDS[f"app.{n}"].label) for n in _BRIEF)]
    lines, line = [Content.styled("Everywhere", _HEADING_STYLE)], Content("")
    for key, label in items:
        item = Content.assemble((key, _KEY_STYLE), f" {label.lower()}")
        if line and line.cell_length + 3 + item.cell_length > width:
            lines.append(line)
            line = Content("")
        line = Content.assemble(line, "   ", item) if line else item
    return [*lines, line]


def _lines(tables: Sequence[_Table], width: int) -> list[Content]:
    """Return the lines of tables, each below its heading.

    The cells of all tables are aligned, and the sentence of a row wraps with a hanging indent. A Rich table
    is not used, since it would take longer to draw than the rest of the page.
    """
    cells_of_all = [cells for _, rows, _ in tables for cells, _ in rows]
    widths = [max(map(len, column)) for column in zip(*cells_of_all, strict=True)]
    lines: list[Content] = []
    for heading, rows, style in tables:
        lines += [Content("")] if lines else []
        lines.append(Content.styled(heading, _HEADING_STYLE))
        for cells, sentence in rows:
            first, *others = (
                f"{cell:<{cell_width}}  " for cell, cell_width in zip(cells, widths, strict=True)
            )
            head = Content.assemble((first, style), *others)
            indent = " " * head.cell_length
            pieces = wrap(sentence, max(_LEAST_SENTENCE, width - head.cell_length))
            lines += [
                (Content(indent) if number else head) + highlight_keys(each)
                for number, each in enumerate(pieces)
            ]
    return lines
