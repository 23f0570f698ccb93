"""The base of dialogs that select one line of a list: a run to watch or chat with, a conversation."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, TypeVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static

from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.widgets.controls import TextField, ViList

Picked = TypeVar("Picked")

_NO_MATCH = "No line matches. Press Esc to show all."


class ListPicker(ModalScreen[Picked | None]):
    """Returns what the selected line stands for; None when closed with Escape."""

    # Absolute: a subclass in another folder would look for it there.
    CSS_PATH = Path(__file__).with_name("modal.tcss")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter"),
        Binding("escape", "leave", "Close"),
    ]
    HEADING: str
    ENTER: ClassVar[str]
    """What Enter does, in a word."""
    EMPTY: ClassVar[str] = ""
    """The text shown without lines."""
    DIALOG_CLASSES: ClassVar[str] = "dialog"
    selected: str | None = None
    """Id of the line that has the cursor at first; None for the first line."""

    @abstractmethod
    def lines(self) -> list[tuple[str, Content]]:
        """An id and the text of each line."""

    @abstractmethod
    def picked(self, id_: str) -> Picked:
        """What the line with this id stands for."""

    def searched_text(self, id_: str) -> str:
        """What the filter searches beside the text of the line with this id."""
        return id_

    def compose(self) -> ComposeResult:
        with Vertical(classes=self.DIALOG_CLASSES) as dialog:
            dialog.border_title = self.HEADING
            dialog.border_subtitle = dialog_keys(ListPicker.BINDINGS, f"Enter {self.ENTER}")
            yield TextField(placeholder="Part of a line", compact=True, id="picker-filter")
            yield ViList()
            yield Static(self.EMPTY, markup=False)

    def on_mount(self) -> None:
        self._lines = self.lines()
        self.query_one(TextField).display = False
        self._show(self._lines, self.EMPTY, self.selected)
        self.query_one(ViList).focus()

    def action_filter(self) -> None:
        """Type a part of a line."""
        self.query_one(TextField).display = True
        self.query_one(TextField).focus()

    def action_leave(self) -> None:
        """Show all lines again, or close."""
        field = self.query_one(TextField)
        if not field.display:
            self.dismiss(None)
            return
        field.value = ""
        field.display = False
        self.query_one(ViList).focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter the list while typing."""
        text = event.value.casefold()
        matching = [
            (id_, line)
            for id_, line in self._lines
            if text in line.plain.casefold() or text in self.searched_text(id_).casefold()
        ]
        self._show(matching, _NO_MATCH)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Go from the filter to the list."""
        event.input.display = bool(event.value)
        self.query_one(ViList).focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Choose it."""
        self.dismiss(self.picked(event.option_id or ""))

    def _show(self, lines: list[tuple[str, Content]], empty: str, select: str | None = None) -> None:
        self.query_one(ViList).show(lines, select)
        self.query_one(ViList).display = bool(lines)
        note = self.query_one(Static)
        note.update(empty)
        note.display = not lines
