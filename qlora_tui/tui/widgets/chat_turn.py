"""One exchange of a chat: what the user said, and each voice's answer beside the others."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownStream

from qlora_tui.chat.terms import Outcome
from qlora_tui.format import figure


class VoiceAnswer(Vertical):
    """One voice's answer, growing."""

    DEFAULT_CSS = """
    VoiceAnswer {
        width: 1fr;
        height: auto;
        padding: 0 1;
    }
    VoiceAnswer .voice {
        height: 1;
        color: $text-muted;
    }
    VoiceAnswer Markdown {
        height: auto;
        margin: 0;
        padding: 0;
        background: $background;
    }
    """

    def __init__(self, voice: str) -> None:
        super().__init__()
        self.voice = voice
        self.text = ""
        self._stream: MarkdownStream | None = None

    def compose(self) -> ComposeResult:
        yield Static(f"{self.voice} …", classes="voice", markup=False)
        yield Markdown("")

    async def grow(self, piece: str) -> None:
        """Add a piece; the stream puts several together where painting is slow."""
        if self._stream is None:
            self._stream = Markdown.get_stream(self.query_one(Markdown))
        self.text += piece
        await self._stream.write(piece)

    async def end(self, outcome: Outcome) -> None:
        """Say how it ended and how fast it was."""
        await self._stop_stream()
        self.text = outcome.text
        self._say(
            f"{self.voice} · {outcome.new_tokens} tokens, {outcome.tokens_per_s:.0f}/s, "
            f"first after {figure(outcome.first_token_s, 2)} s · {outcome.ending}"
        )

    async def fail(self, words: str) -> None:
        """Say that there is no answer."""
        await self._stop_stream()
        self._say(f"{self.voice} · {words}")

    def _say(self, words: str) -> None:
        self.query_one(".voice", Static).update(words)

    async def _stop_stream(self) -> None:
        if self._stream is not None:
            await self._stream.stop()
            self._stream = None


class ChatTurn(Vertical):
    """A prompt and its answers."""

    DEFAULT_CSS = """
    ChatTurn {
        height: auto;
        margin-bottom: 1;
    }
    ChatTurn .prompt {
        height: auto;
        padding: 0 1;
        color: $accent;
        text-style: bold;
    }
    ChatTurn Horizontal {
        height: auto;
    }
    """

    def __init__(self, prompt: str, voices: tuple[str, ...]) -> None:
        super().__init__()
        self.prompt = prompt
        self.answers = {voice: VoiceAnswer(voice) for voice in voices}

    def compose(self) -> ComposeResult:
        yield Static(f"▸ {self.prompt}", classes="prompt", markup=False)
        with Horizontal():
            yield from self.answers.values()
