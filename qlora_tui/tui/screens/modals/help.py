"""Help: an explanation of the current screen, and tables of keys."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, ClassVar, cast

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from qlora_tui.tui.commands import EVERYWHERE, SCREENS, Command, commands_by_screen
from qlora_tui.tui.key_names import dialog_keys, highlight_keys, name_keys, short_key
from qlora_tui.tui.widgets.controls import ViScroll
from qlora_tui.tui.widgets.line_widgets import update_if_changed

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_MAX_WIDTH = 72
"""Width of a modal in cells (``modal.tcss``)."""
_MARGINS = 8
"""Cells that border, padding and scrollbar take."""
_MIN_WIDTH = 16
_KEYMAP_TEXT = (
    "The name beside each key is the command's. To change a key, add the name to [keymap] in config.toml: "
    '"train.stop" = "x". Write keys as ctrl+x, escape, enter, slash, f2; several as "x,f2".'
)


class HelpScreen(ModalScreen[None]):
    """A page generated from the same declarations as the footer and the palette."""

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark", "dismiss", "Close")]

    def __init__(
        self, title: str, text: str, *tables: tuple[str, tuple[Command, ...]], names: bool = False
    ) -> None:
        """``names``: with what a keymap calls each command."""
        super().__init__()
        self._title = title
        self._text = text
        self._tables = [table for table in tables if table[1]]
        self._names = names
        self._wrapped_for = 0
        """The window's width when the lines were broken."""

    def compose(self) -> ComposeResult:
        with ViScroll(classes="dialog") as dialog:
            dialog.border_title = f"Help: {self._title}"
            dialog.border_subtitle = dialog_keys(self.BINDINGS)
            yield Static(highlight_keys(name_keys(self._text)))
            self._wrapped_for = self.app.size.width
            for heading, commands in self._tables:
                yield Static(self._table(heading, commands), classes="commands")

    def on_mount(self) -> None:
        self.query_one(ViScroll).focus()

    def on_resize(self) -> None:
        """A window of another width breaks the lines elsewhere."""
        # Also sent for the width it opened with.
        if self.app.size.width == self._wrapped_for:
            return
        self._wrapped_for = self.app.size.width
        for shown, table in zip(self.query(".commands").results(Static), self._tables, strict=True):
            update_if_changed(shown, self._table(*table))

    def _table(self, heading: str, commands: tuple[Command, ...]) -> Content:
        """By hand: a table of Rich's takes longer to draw than all the rest of the page to open."""
        width_left = min(_MAX_WIDTH, self.app.size.width * 94 // 100) - _MARGINS
        keymap = cast("QloraApp", self.app).settings.keymap
        columns = [[" ".join(map(short_key, command.keys(keymap))) for command in commands]]
        if self._names:
            columns.append([command.id for command in commands])
        widths = [max(map(len, column)) for column in columns]
        lines = [Content.styled(heading, "bold")]
        for number, command in enumerate(commands):
            texts = [f"{column[number]:<{width}}  " for column, width in zip(columns, widths, strict=True)]
            head = " " + "".join(texts)
            pieces = wrap(command.help, max(_MIN_WIDTH, width_left - len(head)))
            lines += [
                Content((" " * len(head) if below else head) + piece) for below, piece in enumerate(pieces)
            ]
        names = dict.fromkeys(command.cli for command in commands if command.cli)
        if names and not self._names:
            in_shell = f"In a shell, qlora-tui has {', '.join(names)}."
            lines += [Content.styled(f" {piece}", "dim") for piece in wrap(in_shell, width_left - 2)]
        return Content("\n").join(lines)


def screen_help(name: str, text: str, commands: tuple[Command, ...]) -> HelpScreen:
    """Help of a screen; the keys of the app do nothing in one that is a modal."""
    entry = next(entry for entry in SCREENS if entry.name == name)
    if entry.is_modal:
        return HelpScreen(entry.label, text, ("Keys", commands))
    return HelpScreen(entry.label, text, ("On this screen", commands), ("Everywhere", EVERYWHERE))


def all_keys_screen() -> HelpScreen:
    """Every key of every screen, with the names of the commands."""
    return HelpScreen("all keys", _KEYMAP_TEXT, *commands_by_screen(), names=True)
