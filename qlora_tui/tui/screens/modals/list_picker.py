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
from textual.widgets import OptionList, Static

from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.widgets.vi_list import ViList

Picked = TypeVar("Picked")


class ListPicker(ModalScreen[Picked | None]):
    """Returns what the selected line stands for; None when closed with Escape."""

    # Absolute: a subclass in another folder would look for it there.
    CSS_PATH = Path(__file__).with_name("modal.tcss")
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]
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

    def compose(self) -> ComposeResult:
        with Vertical(classes=self.DIALOG_CLASSES) as dialog:
            dialog.border_title = self.HEADING
            dialog.border_subtitle = dialog_keys(ListPicker.BINDINGS, f"Enter {self.ENTER}")
            yield ViList()
            yield Static(self.EMPTY, markup=False)

    def on_mount(self) -> None:
        lines = self.lines()
        self.query_one(ViList).show(lines, self.selected)
        self.query_one(ViList).display = bool(lines)
        self.query_one(Static).display = not lines

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Choose it."""
        self.dismiss(self.picked(event.option_id or ""))
