"""Help: the words of the screen in front, and tables of keys."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar, cast

from rich.table import Table as Grid
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widgets import Static

from qlora_tui.tui.commands import Command
from qlora_tui.tui.keymap import Table, every_command
from qlora_tui.tui.widgets.vi_scroll import ViScroll

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_KEYMAP_TEXT = (
    "Beside each key stands the name of what it does. A [keymap] in config.toml gives it another key, "
    'by that name: "train.stop" = "x". Keys are written ctrl+x, escape, enter, slash, f2; several as "x,f2".'
)


class HelpScreen(ModalScreen[None]):
    """One page: made from the same declarations as the footer and the palette."""

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark", "dismiss", "Close")]

    def __init__(self, title: str, text: str, *tables: Table, names: bool = False) -> None:
        """``names``: with what a keymap calls each command."""
        super().__init__()
        self._title = title
        self._text = text
        self._tables = tables
        self._names = names

    def compose(self) -> ComposeResult:
        with ViScroll(classes="card") as card:
            card.border_title = f"Help: {self._title}"
            card.border_subtitle = "esc closes"
            yield Static(self._text, markup=False)
            for heading, commands in self._tables:
                if commands:
                    yield Static(heading, markup=False, classes="heading")
                    yield Static(self._grid(commands))

    def on_mount(self) -> None:
        self.query_one(ViScroll).focus()

    def _grid(self, commands: tuple[Command, ...]) -> Grid:
        grid = Grid.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        for command in commands:
            keys = " ".join(map(self._shown, self._key(command).split(",")))
            verb = f" (qlora-tui {command.verb})" if command.verb and not self._names else ""
            name = (command.id,) if self._names else ()
            grid.add_row(f" {keys}", *name, f"{command.help}{verb}")
        return grid

    def _key(self, command: Command) -> str:
        return cast("QloraApp", self.app).settings.keymap.get(command.id, command.key)

    def _shown(self, key: str) -> str:
        """As the footer has it."""
        return self.app.get_key_display(Binding(key, ""))


async def all_keys() -> HelpScreen:
    """Every key of every screen, with the names of the commands."""
    tables = await asyncio.to_thread(every_command)
    return HelpScreen("all keys", _KEYMAP_TEXT, *tables, names=True)
