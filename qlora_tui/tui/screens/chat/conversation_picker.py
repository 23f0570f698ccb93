"""Selects a saved conversation to continue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import OptionList

from qlora_tui.tui import clock
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.screens.chat.saved_conversations import SavedConversation
from qlora_tui.tui.screens.chat.side_text import conversation_line
from qlora_tui.tui.widgets.vi_list import ViList

_LINE = 70
"""Cells of a line in the dialog."""


class ConversationPicker(ModalScreen[Path | None]):
    """Returns the file of the chosen conversation; None when closed with Escape."""

    CSS_PATH = "../modals/modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]

    def __init__(self, conversations: Sequence[tuple[Path, SavedConversation]]) -> None:
        super().__init__()
        self._conversations = conversations

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide") as dialog:
            dialog.border_title = "Saved conversations"
            dialog.border_subtitle = dialog_keys(self.BINDINGS, "Enter open")
            yield ViList()

    def on_mount(self) -> None:
        now = clock.now()
        lines = [(str(path), conversation_line(saved, now, _LINE)) for path, saved in self._conversations]
        self.query_one(ViList).show(lines)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Choose it."""
        self.dismiss(Path(event.option_id or ""))
