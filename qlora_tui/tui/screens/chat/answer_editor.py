"""A dialog in which an answer is edited, as it should have been."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static, TextArea

from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.widgets.controls import OwnKeysFirst


class AnswerArea(OwnKeysFirst, TextArea):
    """A text of several lines: Enter makes a line."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+s", "screen.save", show=False)]


class AnswerEditor(ModalScreen[str | None]):
    """Returns the edited answer; None if it was cancelled, left as it was, or emptied."""

    CSS_PATH = "../modals/modal.tcss"
    DEFAULT_CSS = """
    AnswerEditor AnswerArea, AnswerEditor AnswerArea:focus {
        height: 14;
        border: none;
        background: $surface;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "Save"),
        Binding("escape", "dismiss(None)", "Cancel"),
    ]

    def __init__(self, adapter_name: str, answer: str) -> None:
        super().__init__()
        self._adapter_name = adapter_name
        self._answer = answer

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide") as dialog:
            dialog.border_title = f"Edit the answer of {self._adapter_name}"
            dialog.border_subtitle = dialog_keys(self.BINDINGS)
            yield Static("Write it as it should have been. It is kept as data to train on.")
            area = AnswerArea(self._answer, soft_wrap=True, show_line_numbers=False, tab_behavior="focus")
            area.cursor_blink = False
            yield area

    def on_mount(self) -> None:
        area = self.query_one(AnswerArea)
        area.focus()
        area.move_cursor(area.document.end)

    def action_save(self) -> None:
        """Return the text if it was changed."""
        text = self.query_one(AnswerArea).text.strip()
        self.dismiss(text if text and text != self._answer else None)
