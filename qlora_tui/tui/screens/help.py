"""Help: the keys of the screen in front and of the app, and the screen's words."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from qlora_tui.tui.commands import EVERYWHERE, Command


class HelpScreen(ModalScreen[None]):
    """One page: made from the same declarations as the footer and the palette."""

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark", "dismiss", "Close")]

    def __init__(self, title: str, text: str, commands: tuple[Command, ...]) -> None:
        super().__init__()
        self._title = title
        self._text = text
        self._commands = commands

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="card") as card:
            card.border_title = f"Help: {self._title}"
            card.border_subtitle = "esc closes"
            if self._text:
                yield Static(self._text, markup=False)
            if self._commands:
                yield Static(self._table("On this screen", self._commands))
            yield Static(self._table("Everywhere", EVERYWHERE))

    def on_mount(self) -> None:
        self.query_one(VerticalScroll).focus()

    def _table(self, title: str, commands: tuple[Command, ...]) -> Content:
        lines = [Content.styled(title, "bold")]
        keys = [" ".join(map(self._shown, command.key.split(","))) for command in commands]
        width = max(map(len, keys))
        for key, command in zip(keys, commands, strict=True):
            verb = f"  (qlora-tui {command.verb})" if command.verb else ""
            lines.append(Content(f" {key:<{width}}  {command.help}{verb}"))
        return Content("\n").join(lines)

    def _shown(self, key: str) -> str:
        """As the footer has it."""
        return self.app.get_key_display(Binding(key, ""))
