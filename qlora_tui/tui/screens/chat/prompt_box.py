"""The prompt field of the chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from qlora_tui.tui.widgets.controls import OwnKeysFirst


class PromptBox(OwnKeysFirst, TextArea):
    """The prompt field. Enter sends, Ctrl+J starts a new line, pasted line breaks stay, and the field grows
    with its text.
    """

    DEFAULT_CSS = """
    PromptBox, PromptBox:focus {
        height: auto;
        max-height: 8;
        border: none;
        padding-right: 1;
        width: 1fr;
        background: $panel;
        scrollbar-size-vertical: 1;
        & .text-area--placeholder { color: $text-muted; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", show=False),
        Binding("ctrl+j", "new_line", show=False),
    ]

    @dataclass
    class Sent(Message):
        """Posted when Enter is pressed in a field with text."""

        text: str

    class Recalled(Message):
        """Posted when Up is pressed in the empty field."""

    def __init__(self, *, id: str) -> None:
        super().__init__(
            id=id, soft_wrap=True, show_line_numbers=False, tab_behavior="focus", placeholder="Type a message"
        )
        self.cursor_blink = False
        self.highlight_cursor_line = False

    def action_send(self) -> None:
        """If the field has text, clear the field and post ``Sent``."""
        text = self.text.strip()
        if text:
            self.text = ""
            self.post_message(self.Sent(text))

    def action_new_line(self) -> None:
        """Insert a line break at the cursor."""
        self.insert("\n")

    def put(self, text: str) -> None:
        """Replace the text, move the cursor to the end of the text, and focus the field."""
        self.text = text
        self.move_cursor(self.document.end)
        self.focus()

    async def on_key(self, event: events.Key) -> None:
        if event.key == "up" and not self.text:
            event.stop()
            event.prevent_default()
            self.post_message(self.Recalled())
