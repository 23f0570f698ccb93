"""Separates a model's thoughts from its answer in a stream of text, without torch.

Models write thoughts between marks: ``<think>`` and ``</think>`` (Qwen, GLM, DeepSeek, SmolLM3), ``[THINK]``
(Mistral), ``<|channel>thought`` (Gemma 4), or named channels (gpt-oss). ``marks_in_template`` finds the marks
in a chat template, and ``ThoughtSplitter`` splits a stream of text at them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

SplitterState = Literal["start", "thought", "answer"]
"""State before any text, in a thought, or in the answer."""


class TextChunk(Struct, frozen=True):
    """A piece of a model's output."""

    text: str
    thought: bool = False
    """Whether the text is a thought rather than part of the answer."""
    tokens: int = 0
    """Number of tokens of the thought so far."""


class ThoughtMark(Struct, frozen=True):
    """A marker text, which is not shown, and the state of the splitter after it."""

    text: str
    seen_in: tuple[SplitterState, ...]
    """States in which the text is a marker; in other states, such as in an answer, it is ordinary text."""
    next_state: SplitterState


_THINK = (
    ThoughtMark("<think>", ("start",), "thought"),
    ThoughtMark("</think>", ("start", "thought"), "answer"),
)
_MISTRAL = (ThoughtMark("[THINK]", ("start",), "thought"), ThoughtMark("[/THINK]", ("thought",), "answer"))
_GEMMA = (
    ThoughtMark("<|channel>thought\n", ("start",), "thought"),
    ThoughtMark("<channel|>", ("thought",), "answer"),
)
_ANY_STATE: tuple[SplitterState, ...] = ("start", "thought", "answer")
_GPT_OSS = (
    ThoughtMark("<|channel|>analysis<|message|>", _ANY_STATE, "thought"),
    ThoughtMark("<|channel|>final<|message|>", _ANY_STATE, "answer"),
    ThoughtMark("<|channel|>commentary<|message|>", _ANY_STATE, "answer"),
    ThoughtMark("<|start|>assistant", _ANY_STATE, "answer"),
    ThoughtMark("<|end|>", _ANY_STATE, "answer"),
)


def marks_in_template(literals: str) -> tuple[ThoughtMark, ...]:
    """Return the marks of a model whose chat template writes ``literals``; ``<think>`` by default."""
    for name, marks in (("<|channel|>analysis", _GPT_OSS), ("<channel|>", _GEMMA), ("[THINK]", _MISTRAL)):
        if name in literals:
            return marks
    return _THINK


class ThoughtSplitter:
    """Splits text that is fed in pieces; the joined chunks are the text without its marks."""

    def __init__(self, marks: tuple[ThoughtMark, ...], *, in_thought: bool = False) -> None:
        """Set the marks; ``in_thought`` means that the prompt has already opened a thought."""
        self._marks = marks
        self._pending = ""
        self._trimming = in_thought
        """Whether white space between a mark and the text after it is dropped."""
        self.state: SplitterState = "thought" if in_thought else "start"

    @property
    def in_thought(self) -> bool:
        return self.state == "thought"

    @property
    def pending_length(self) -> int:
        """Return the number of characters that are held back."""
        return len(self._pending)

    def feed(self, text: str) -> list[TextChunk]:
        """Return the complete chunks; the beginning of a possible mark is held back."""
        self._pending += text
        chunks: list[TextChunk] = []
        while mark := self._first_mark():
            before, _, self._pending = self._pending.partition(mark.text)
            if self.state != "start":
                self._append(chunks, before)
            self.state, self._trimming = mark.next_state, True
        held_back = self._held_back_length()
        ready = self._pending[: len(self._pending) - held_back]
        self._pending = self._pending[len(ready) :]
        self._append(chunks, ready)
        return chunks

    def rest(self) -> list[TextChunk]:
        """Return the text that is still held back at the end."""
        chunks: list[TextChunk] = []
        ready, self._pending = self._pending, ""
        self._append(chunks, ready)
        return chunks

    def _append(self, chunks: list[TextChunk], text: str) -> None:
        if self._trimming:
            text = text.lstrip()
        if not text:
            return
        self._trimming = False
        if self.state == "start":
            self.state = "answer"
        chunks.append(TextChunk(text, thought=self.in_thought))

    def _first_mark(self) -> ThoughtMark | None:
        places = [
            (place, -len(mark.text), mark)
            for mark in self._marks
            if self.state in mark.seen_in and (place := self._pending.find(mark.text)) >= 0
        ]
        # Before an answer only white space may precede a thought.
        if self.state == "start":
            places = [candidate for candidate in places if not self._pending[: candidate[0]].strip()]
        return min(places, key=lambda candidate: candidate[:2])[2] if places else None

    def _held_back_length(self) -> int:
        """Count the characters at the end that may begin a mark, or white space that may precede one."""
        text, state = self._pending, self.state
        if state == "start":
            begun = text.lstrip()
            if any(mark.text.startswith(begun) for mark in self._marks if "start" in mark.seen_in):
                return len(text)
            state = "answer"
        return begun_length(text, [mark.text for mark in self._marks if state in mark.seen_in])


def begun_length(text: str, marks: Sequence[str]) -> int:
    """Return how many characters at the end of ``text`` may begin a mark; ``text`` holds no complete mark."""
    longest = min(max(map(len, marks), default=1) - 1, len(text))
    sizes = (n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks))
    return next(sizes, 0)
