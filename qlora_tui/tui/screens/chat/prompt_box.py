"""Where a prompt is written: enter sends, ctrl+j makes a line, it grows with its text."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.widgets import TextArea

from qlora_tui.tui.widgets.controls import OwnKeysFirst


class PromptBox(OwnKeysFirst, TextArea):
    """A pasted text keeps its lines."""

    DEFAULT_CSS = """
    PromptBox, PromptBox:focus {
        height: auto;
        max-height: 8;
        border: none;
        padding: 0 1;
        background: $surface;
        scrollbar-size-vertical: 1;
        & .text-area--placeholder { color: $text-muted; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", show=False),
        Binding("ctrl+j", "new_line", show=False),
    ]

    class Sent(Message):
        """Enter was pressed on some text."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    class Recalled(Message):
        """Up was pressed in the empty box."""

    def __init__(self, placeholder: str, *, id: str) -> None:
        super().__init__(
            id=id,
            placeholder=Content(placeholder),
            soft_wrap=True,
            show_line_numbers=False,
            tab_behavior="focus",
        )
        self.cursor_blink = False
        self.highlight_cursor_line = False

    def action_send(self) -> None:
        """Post ``Sent`` and clear the field."""
        text = self.text.strip()
        if text:
            self.text = ""
            self.post_message(self.Sent(text))

    def action_new_line(self) -> None:
        """Break the line."""
        self.insert("\n")

    def put(self, text: str) -> None:
        """Replace the text; the cursor goes to its end."""
        self.text = text
        self.move_cursor(self.document.end)
        self.focus()

    async def on_key(self, event: events.Key) -> None:
        if event.key == "up" and not self.text:
            event.stop()
            event.prevent_default()
            self.post_message(self.Recalled())
