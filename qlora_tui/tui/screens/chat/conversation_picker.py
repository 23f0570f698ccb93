"""Selects a saved conversation to continue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from textual.content import Content

from qlora_tui.tui import clock
from qlora_tui.tui.screens.chat.saved_conversations import SavedConversation
from qlora_tui.tui.screens.chat.side_text import conversation_line
from qlora_tui.tui.screens.modals.list_picker import ListPicker

_LINE = 70
"""Cells of a line in the dialog."""


class ConversationPicker(ListPicker[Path]):
    """Returns the file of the chosen conversation; None when closed with Escape."""

    HEADING = "Saved conversations"
    ENTER = "open"
    DIALOG_CLASSES = "dialog wide"

    def __init__(self, conversations: Sequence[tuple[Path, SavedConversation]]) -> None:
        super().__init__()
        self._conversations = conversations

    def lines(self) -> list[tuple[str, Content]]:
        now = clock.now()
        return [(str(path), conversation_line(saved, now, _LINE)) for path, saved in self._conversations]

    def searched_text(self, id_: str) -> str:
        saved = dict(self._conversations)[Path(id_)]
        answers = (answer.text for turn in saved.turns for answer in turn.answers.values())
        return "\n".join((*(turn.prompt for turn in saved.turns), *answers))

    def picked(self, id_: str) -> Path:
        return Path(id_)
