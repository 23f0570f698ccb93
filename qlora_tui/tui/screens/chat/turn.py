"""One turn of a chat: the prompt, and the answers of all adapters side by side, each preceded by its
reasoning.
"""

from __future__ import annotations

import time
from functools import partial
from uuid import uuid4

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len
from textual import events
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.geometry import Size
from textual.message import Message
from textual.widgets import Markdown, Static

from qlora_tui.chat.chat_sources import adapter_label
from qlora_tui.chat.chat_types import BASE, Decided, GenerationResult
from qlora_tui.data.repetition import find_loop
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_percent, format_speed, format_wait, pluralize, truncate_middle
from qlora_tui.tui.key_names import highlight_keys, key_while_typing, name_keys
from qlora_tui.tui.render.labels import error_content
from qlora_tui.tui.render.meters import bar
from qlora_tui.tui.widgets.controls import Drawing, Panel

_ANSWER_EVERY_S, _THOUGHT_EVERY_S = 0.15, 0.5
"""Seconds between repaints of an answer, and of the line that stands for a folded thought. They are long
enough for slow connections.
"""
_ENDINGS = {
    "most tokens": "Cut off at the token limit. Press {chat.settings} to raise it.",
    "context full": "Cut off: the context is full.",
    "stopped": "Stopped.",
}
"""Note below an answer that is incomplete, by finish reason."""
_STILL_THINKING = {
    "most tokens": "Still thinking at the token limit. Press {chat.settings} to raise it, or {chat.thinking} "
    "to turn thinking off.",
    "context full": "Still thinking when the context was full. Press {chat.thinking} to turn thinking off.",
    "stopped": "Stopped while thinking.",
}
"""Note below a thought that is incomplete, by finish reason."""
_LOOP = (
    "Stopped: the model kept repeating “{phrase}”. Press {{chat.retry}} for another answer, or "
    "{{chat.settings}} to set a repetition penalty."
)
_MAX_PHRASE = 60
GROWTH_ROWS = 6
"""Number of rows by which the height of answers grows at a time while they are generated."""
_MOST_BARS, _MAX_BAR = 6, 30
"""Maximum number of options with a bar, and maximum width of a bar in cells."""
_LEAST_SHOWN = 0.005
"""Minimum probability of an option with a bar. The two most probable options always have a bar."""
_QUESTION = (
    "Which answer is better? Esc, then {chat.prefer_left} left or {chat.prefer_right} right; "
    "{chat.edit_answer} edits the adapter's answer."
)


class StreamingMarkdown(Markdown):
    """Markdown to which text is appended piece by piece. Call :meth:`append_text` for each piece, and
    :meth:`finish` after the last piece.
    """

    DEFAULT_CSS = """
    StreamingMarkdown {
        height: auto;
        margin: 0;
        padding: 0;
        background: transparent;
    }
    StreamingMarkdown MarkdownBlock:last-child {
        margin-bottom: 0;
    }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__("", parser_factory=_parser, open_links=False, id=id)
        self._waiting = ""
        self._painted_at = 0.0

    async def append_text(self, piece: str) -> None:
        """Append a piece. It is painted at once or, if the last repaint was very recent, together with a
        later piece.
        """
        self._waiting += piece
        if time.monotonic() - self._painted_at >= _ANSWER_EVERY_S:
            await self.finish()

    async def finish(self) -> None:
        """Paint the pieces that have not been painted yet."""
        if self._waiting:
            waiting, self._waiting = self._waiting, ""
            await self.append(waiting)
            self._painted_at = time.monotonic()


def _parser() -> MarkdownIt:
    """Return a parser for GitHub-flavored Markdown. It keeps single line breaks, because models intend them
    as line breaks.
    """
    parser = MarkdownIt("gfm-like")
    parser.core.ruler.push("keep_line_ends", _keep_line_ends)
    return parser


def _keep_line_ends(state: object) -> None:
    tokens: list[Token] = getattr(state, "tokens", [])
    for token in tokens:
        for child in token.children or []:
            if child.type == "softbreak":
                child.type = "hardbreak"


class ThoughtLine(Static):
    """A line such as ``Thought for 12 s, 340 tokens``, with the key that unfolds all thoughts. A click on the
    line unfolds only this thought.
    """

    async def on_click(self, event: events.Click) -> None:
        """Fold the thought if it is unfolded; otherwise unfold it."""
        event.stop()
        view = self.parent
        assert isinstance(view, ThoughtView)
        await view.unfold(not view.unfolded)


class ThoughtView(Vertical):
    """The thought before an answer, hidden while there is no thought.

    While the thought is folded, its text is stored but not laid out.
    """

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
        """Number of characters of ``text`` that have been given to the Markdown widget."""
        self._tokens = 0
        self._began_at = 0.0
        self._painted_at = 0.0
        self._is_over = False
        self._ending: tuple[float, bool] = (0.0, True)
        """Seconds that the thought took, and whether the thought was completed."""

    def compose(self) -> ComposeResult:
        yield ThoughtLine("")
        yield StreamingMarkdown()

    @property
    def unfolded(self) -> bool:
        return self.has_class("-unfolded")

    async def append_text(self, chunk: TextChunk) -> None:
        """Append a piece of the thought."""
        now = time.monotonic()
        if not self.text:
            self._began_at = now
            self.add_class("-begun")
        self.text += chunk.text
        self._tokens = chunk.tokens
        if self.unfolded:
            await self._append_pending()
        if now - self._painted_at >= _THOUGHT_EVERY_S:
            self._painted_at = now
            self._show_line()

    async def end(self, outcome: GenerationResult | None = None) -> None:
        """End the thought, because the answer begins or generation has ended. ``outcome``: the result of the
        generation, with exact figures for the thought; None if it is not known yet.
        """
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
        """Show the text if ``unfolded``; otherwise fold it into one line."""
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
        took = format_wait(seconds)
        verb = "Thinking for" if not self._is_over else "Thought for" if ended else "Unfinished:"
        line = f"{'−' if self.unfolded else '+'} {verb} {took}, {pluralize(self._tokens, 'token')}"
        self.query_one(ThoughtLine).update(
            Content.assemble(line, (f"  {key_while_typing('chat.unfold')}", "dim"))
        )


def decision_lines(decided: Decided, width: int, height: int) -> list[Content]:
    """Return a bar with the probability of each option or, if the decision has fields, of each value of each
    field. Of the options after the second, improbable ones are left out. A decision that is not calibrated
    has a note in the last line. Lines have at most ``width`` cells; ``height`` has no effect.
    """
    groups = decided.fields or {"": decided.options}
    shown = [
        (field, each)
        for field, options in groups.items()
        for place, each in enumerate(options[:_MOST_BARS])
        if place < 2 or each.probability >= _LEAST_SHOWN
    ]
    names = [truncate_middle(f"{field} {each.option}".strip(), max(8, width // 2)) for field, each in shown]
    cells = max(map(cell_len, names)) + 2
    of_bar = max(1, min(_MAX_BAR, width - cells - len(" 100%")))
    lines = [
        Content.assemble(
            f"{name}{' ' * (cells - cell_len(name))}",
            (bar(each.probability, of_bar), "$success" if each is groups[field][0] else "dim"),
            f" {format_percent(each.probability):>4}",
        )
        for name, (field, each) in zip(names, shown, strict=True)
    ]
    note = [] if decided.is_calibrated else [Content.styled("not calibrated", "dim")]
    return [*lines, *note]


class AdapterAnswer(Panel):
    """One adapter's answer, both during and after its generation."""

    DEFAULT_CSS = """
    AdapterAnswer {
        width: 1fr;
    }
    AdapterAnswer Static {
        height: auto;
    }
    AdapterAnswer .decision {
        height: auto;
        display: none;
    }
    """

    def __init__(self, adapter_name: str, *, beside: bool, unfolded: bool = False) -> None:
        super().__init__(answer_title(adapter_name, "…"), classes="-beside" if beside else "")
        self.adapter_name = adapter_name
        self.text = ""
        self._thought = ThoughtView(unfolded=unfolded)
        self.loop = ""
        """The phrase that the model kept repeating, if generation was stopped for that reason; otherwise
        empty.
        """
        self.outcome: GenerationResult | None = None
        self.is_growing = False
        """Whether the answer or its thought has begun but not ended."""

    def compose(self) -> ComposeResult:
        yield self._thought
        yield StreamingMarkdown(id="answer")
        yield Drawing(classes="decision")
        note = Static("", classes="answer-note")
        note.display = False
        yield note

    @property
    def was_cut(self) -> bool:
        """Whether generation ended before the model ended its turn."""
        return self.outcome is not None and self.outcome.ending in _ENDINGS

    @property
    def thought(self) -> str:
        """The thought before the answer; empty if there is none."""
        return self._thought.text.strip()

    async def append_text(self, chunk: TextChunk) -> None:
        """Append a piece of the thought if ``chunk.thought`` is True, otherwise a piece of the answer."""
        self.is_growing = True
        if chunk.thought:
            await self._thought.append_text(chunk)
            return
        if not self.text:
            await self._thought.end()
        self.text += chunk.text
        await self._answer.append_text(chunk.text)

    def notice_loop(self) -> bool:
        """Return whether the answer or the thought has just started to repeat itself."""
        if not self.loop:
            self.loop = find_loop(self.text or self._thought.text)
            return bool(self.loop)
        return False

    async def show_saved(self, text: str, thought: str) -> None:
        """Show an answer from a saved conversation."""
        if thought:
            await self._thought.append_text(TextChunk(thought, thought=True))
            await self._thought.end()
        self.text = text
        await self._answer.append_text(text)
        await self._answer.finish()
        self.show_title(answer_title(self.adapter_name, "saved"))

    async def unfold(self, unfolded: bool) -> None:
        """Show the thought if ``unfolded``; otherwise fold it into one line."""
        await self._thought.unfold(unfolded)

    @property
    def _answer(self) -> StreamingMarkdown:
        return self.query_one("#answer", StreamingMarkdown)

    async def end(self, outcome: GenerationResult) -> None:
        """Complete the answer, and show its speed and why it ended."""
        await self._finish(outcome)
        self.text, self.outcome = outcome.text, outcome
        self.show_title(answer_title(self.adapter_name, outcome_words(outcome)))
        under = _ENDINGS.get(
            outcome.ending, "" if outcome.text.strip() else "The model ended its turn immediately."
        )
        if not outcome.thought_ended:
            under = _STILL_THINKING.get(outcome.ending, "The model ended its turn without an answer.")
        if self.loop:
            under = _LOOP.format(phrase=truncate_middle(self.loop, _MAX_PHRASE))
        if under:
            self._show_note(name_keys(under))

    def show_decision(self, decided: Decided) -> None:
        """Show the probabilities of this decision below the answer."""
        bars = self.query_one(".decision", Drawing)
        bars.show(partial(decision_lines, decided))
        bars.display = True

    def show_judgment(self, judgment: str) -> None:
        """Show the user's judgment, ``better`` or ``edited``, in the title. An empty text removes the
        judgment.
        """
        words = "" if self.outcome is None else outcome_words(self.outcome)
        self.set_class(bool(judgment), "-judged")
        self.show_title(answer_title(self.adapter_name, f"✓ {judgment}" if judgment else words))

    async def stop(self, words: str) -> None:
        """Mark the answer as stopped, with the note ``words``. The text so far is kept."""
        await self._finish()
        self.show_title(answer_title(self.adapter_name, "stopped"))
        self._show_note(words)

    async def fail(self, problem: UserError) -> None:
        """Show the error that prevented or interrupted the answer. The text so far is kept."""
        await self._finish()
        self.show_title(answer_title(self.adapter_name, "no answer"))
        self._update_note(error_content(problem))

    async def _finish(self, outcome: GenerationResult | None = None) -> None:
        """Paint the text that has not been painted yet, and end the thought. :meth:`ThoughtView.end`
        describes ``outcome``.
        """
        await self._answer.finish()
        await self._thought.end(outcome)
        self.is_growing = False
        self.refresh(layout=True)

    def _show_note(self, words: str) -> None:
        self._update_note(highlight_keys(f"■ {words}", "dim"))

    def _update_note(self, text: Content) -> None:
        note = self.query_one(".answer-note", Static)
        note.update(text)
        note.display = True


def answer_title(adapter_name: str, words: str) -> Content:
    """Return the title of an answer: the name of its adapter, followed by ``words``."""
    return Content.assemble(
        (adapter_label(adapter_name), adapter_style(adapter_name)), (f" · {words}", "not bold $text-muted")
    )


def adapter_style(adapter_name: str) -> str:
    """Return the style of an adapter's name: the theme's ``$training`` color or, for the base model, the
    normal text color.
    """
    return "$foreground" if adapter_name == BASE else "$training"


def outcome_words(outcome: GenerationResult) -> str:
    """Return an answer's number of new tokens, tokens per second, and time to the first token: ``34 tok,
    12/s, wait 0.4 s``. If there are no new tokens, return ``nothing``.
    """
    per_s = outcome.tokens_per_s
    speed = f", {format_speed(per_s)}/s" if per_s else ""
    first = format_wait(outcome.first_token_s)
    return f"{outcome.new_tokens:,} tok{speed}, wait {first}" if outcome.new_tokens else "nothing"


class Answers(Horizontal):
    """The answers of a turn, side by side.

    While an answer is being generated, the height is rounded up to a multiple of :data:`GROWTH_ROWS`.
    Otherwise, each additional row would move and repaint other rows, such as the suggestions below the
    conversation.
    """

    DEFAULT_CSS = """
    Answers {
        height: auto;
    }
    """

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        rows = super().get_content_height(container, viewport, width)
        is_growing = any(isinstance(each, AdapterAnswer) and each.is_growing for each in self.children)
        return -(-rows // GROWTH_ROWS) * GROWTH_ROWS if is_growing else rows


class ChatTurn(Vertical):
    """A prompt and the answers of the adapters."""

    class Resized(Message):
        """Posted when the size of a turn has changed."""

    DEFAULT_CSS = """
    ChatTurn {
        height: auto;
        margin-top: 1;
    }
    ChatTurn .prompt {
        height: auto;
        padding: 0 1;
        text-style: bold;
    }
    ChatTurn .question {
        height: auto;
        padding: 0 1;
        display: none;
    }
    """

    def __init__(self, prompt: str, adapter_names: tuple[str, ...], *, unfolded: bool = False) -> None:
        super().__init__()
        self.prompt = prompt
        self.key = uuid4().hex
        """Id of this turn in saved judgments."""
        self.answers = {
            adapter_name: AdapterAnswer(adapter_name, beside=number > 0, unfolded=unfolded)
            for number, adapter_name in enumerate(dict.fromkeys(adapter_names))
        }

    def on_resize(self) -> None:
        self.post_message(self.Resized())

    def contains(self, text: str) -> bool:
        """Return whether the prompt, an answer or a thought contains this text, ignoring case."""
        said = (
            self.prompt,
            *(part for answer in self.answers.values() for part in (answer.text, answer.thought)),
        )
        return any(text.casefold() in part.casefold() for part in said)

    def compose(self) -> ComposeResult:
        yield Static(f"❯ {self.prompt}", classes="prompt", markup=False)
        yield Answers(*self.answers.values())
        yield Static(highlight_keys(name_keys(_QUESTION), "dim"), classes="question")

    def show_question(self, visible: bool) -> None:
        """If ``visible``, and there are two different answers, show the keys that select the better answer;
        otherwise, hide these keys.
        """
        texts = {answer.text.strip() for answer in self.answers.values()} - {""}
        self.query_one(".question").display = visible and len(texts) > 1
