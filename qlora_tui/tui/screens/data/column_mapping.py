"""Maps the columns of a file with unusual names to prompt, answer, and so on."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import ModalScreen
from textual.suggester import SuggestFromList
from textual.widgets import Input, Label, Static

from qlora_tui.data.formats import parts_of
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.widgets.controls import TextField


class ColumnMappingScreen(ModalScreen[dict[str, str]]):
    """One field a part; gives the mapping, or None when closed with Escape."""

    CSS_PATH = ["../modals/modal.tcss", "../modals/fields.tcss"]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]

    def __init__(self, format_: str, columns: tuple[str, ...], mapping: dict[str, str]) -> None:
        super().__init__()
        self._format = format_
        self._columns = columns
        self._mapping = mapping

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog", can_focus=False) as dialog:
            dialog.border_title = f"Columns of {self._format}"
            dialog.border_subtitle = dialog_keys(self.BINDINGS, "Tab next", "→ complete", "Enter apply")
            yield Static(f"Columns in the file: {', '.join(self._columns)}", markup=False, classes="muted")
            for part in parts_of(self._format):
                with Horizontal(classes="field"):
                    yield Label(part.replace("_", " "))
                    yield TextField(
                        self._mapping.get(part, ""),
                        name=part,
                        placeholder="none",
                        compact=True,
                        suggester=SuggestFromList(self._columns, case_sensitive=False),
                    )

    def on_input_submitted(self) -> None:
        """Take what the fields say; an empty one leaves the part out."""
        given = {field.name or "": field.value.strip() for field in self.query(Input)}
        self.dismiss({part: column for part, column in given.items() if column})
