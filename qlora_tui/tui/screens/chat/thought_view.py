"""What a model thinks before it answers: one line that unfolds."""

from __future__ import annotations

import time

from textual import events
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

from qlora_tui.chat.chat_types import GenerationResult
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.formatting import format_duration, pluralize
from qlora_tui.tui.key_names import key_while_typing
from qlora_tui.tui.screens.chat.streaming_markdown import StreamingMarkdown

_PAINT_EVERY_S = 0.5


class ThoughtLine(Static):
    """``Thought for 12 s, 340 tokens``, and the key of all of them. A click unfolds this one."""

    async def on_click(self, event: events.Click) -> None:
        """Unfold the thought, or fold it again."""
        event.stop()
        view = self.parent
        assert isinstance(view, ThoughtView)
        await view.unfold(not view.unfolded)


class ThoughtView(Vertical):
    """Hidden until a thought begins. While it is folded, its text is stored but not laid out."""

    DEFAULT_CSS = """
    ThoughtView {
        height: auto;
        display: none;
    }
    ThoughtView.-begun {
        display: block;
    }
    ThoughtView ThoughtLine {
        color: $text-muted;
        text-wrap: nowrap;
        text-overflow: ellipsis;
    }
    ThoughtView StreamingMarkdown {
        border-left: outer $panel;
        padding-left: 1;
        margin-bottom: 1;
        color: $text-muted;
        display: none;
    }
    ThoughtView.-unfolded StreamingMarkdown {
        display: block;
    }
    """

    def __init__(self, *, unfolded: bool = False) -> None:
        super().__init__(classes="-unfolded" if unfolded else "")
        self.text = ""
        self._appended = 0
        """Characters of the text that are in the widget which shows it."""
        self._tokens = 0
        self._began_at = 0.0
        self._painted_at = 0.0
        self._is_over = False
        self._ending: tuple[float, bool] = (0.0, True)
        """Seconds it took, and whether it came to its end."""

    def compose(self) -> ComposeResult:
        yield ThoughtLine("")
        yield StreamingMarkdown()

    @property
    def unfolded(self) -> bool:
        return self.has_class("-unfolded")

    async def append_text(self, chunk: TextChunk) -> None:
        """Add a piece of the thought."""
        now = time.monotonic()
        if not self.text:
            self._began_at = now
            self.add_class("-begun")
        self.text += chunk.text
        self._tokens = chunk.tokens
        if self.unfolded:
            await self._append_pending()
        if now - self._painted_at >= _PAINT_EVERY_S:
            self._painted_at = now
            self._show_line()

    async def end(self, outcome: GenerationResult | None = None) -> None:
        """The answer begins, or nothing more comes; ``outcome`` has the exact figures."""
        if not self.text:
            return
        if not self._is_over:
            self._ending = (time.monotonic() - self._began_at, True)
        if outcome is not None:
            self._tokens = outcome.thought_tokens
            self._ending = (outcome.thought_s, outcome.thought_ended)
        self._is_over = True
        if self.unfolded:
            await self._append_pending()
            await self.query_one(StreamingMarkdown).finish()
        self._show_line()

    async def unfold(self, unfolded: bool) -> None:
        """Show the text, or fold it into the line."""
        self.set_class(unfolded, "-unfolded")
        if unfolded:
            await self._append_pending()
            await self.query_one(StreamingMarkdown).finish()
        self._show_line()

    async def _append_pending(self) -> None:
        text, self._appended = self.text[self._appended :], len(self.text)
        await self.query_one(StreamingMarkdown).append_text(text)

    def _show_line(self) -> None:
        if not self.text:
            return
        seconds, ended = self._ending
        if not self._is_over:
            seconds = time.monotonic() - self._began_at
        took = f"{seconds:.1f} s" if seconds < 10 else format_duration(seconds)
        verb = "Thinking for" if not self._is_over else "Thought for" if ended else "Unfinished:"
        line = f"{'▾' if self.unfolded else '▸'} {verb} {took}, {pluralize(self._tokens, 'token')}"
        self.query_one(ThoughtLine).update(
            Content.assemble(line, (f"  {key_while_typing('chat.unfold')}", "dim"))
        )
