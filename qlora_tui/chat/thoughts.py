"""Telling a model's thoughts from its answer while the text comes. Loads no torch.

Models write thoughts between marks: ``<think>`` and ``</think>`` (Qwen, GLM, DeepSeek, SmolLM3), ``[THINK]``
(Mistral), ``<|channel>thought`` (Gemma 4), or channels with a name (gpt-oss). ``marks_of`` knows them by the
chat template, ``ThoughtSplitter`` cuts a stream of text at them.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from qlora_tui.chat.terms import Said

State = Literal["start", "thought", "answer"]
"""Nothing said yet; in a thought; in the answer."""


class Mark(Struct, frozen=True):
    """A text that is not shown, and after which the text is of another kind."""

    text: str
    seen_in: tuple[State, ...]
    """Elsewhere it is ordinary text: an answer may be about ``<think>``."""
    to: State


_THINK = (Mark("<think>", ("start",), "thought"), Mark("</think>", ("start", "thought"), "answer"))
_MISTRAL = (Mark("[THINK]", ("start",), "thought"), Mark("[/THINK]", ("thought",), "answer"))
_GEMMA = (Mark("<|channel>thought\n", ("start",), "thought"), Mark("<channel|>", ("thought",), "answer"))
_ANYWHERE: tuple[State, ...] = ("start", "thought", "answer")
_GPT_OSS = (
    Mark("<|channel|>analysis<|message|>", _ANYWHERE, "thought"),
    Mark("<|channel|>final<|message|>", _ANYWHERE, "answer"),
    Mark("<|channel|>commentary<|message|>", _ANYWHERE, "answer"),
    Mark("<|start|>assistant", _ANYWHERE, "answer"),
    Mark("<|end|>", _ANYWHERE, "answer"),
)


def marks_of(literals: str) -> tuple[Mark, ...]:
    """The marks of a model whose chat template writes ``literals``; ``<think>`` where it names none."""
    for name, marks in (("<|channel|>analysis", _GPT_OSS), ("<channel|>", _GEMMA), ("[THINK]", _MISTRAL)):
        if name in literals:
            return marks
    return _THINK


class ThoughtSplitter:
    """Feed it text piece by piece; what it returns, joined, is the text without its marks."""

    def __init__(self, marks: tuple[Mark, ...], *, in_thought: bool = False) -> None:
        """``in_thought``: the prompt has opened a thought already."""
        self._marks = marks
        self._waiting = ""
        self._trimming = in_thought
        """Whether white space is left out: what stands between a mark and a text."""
        self.state: State = "thought" if in_thought else "start"

    @property
    def in_thought(self) -> bool:
        return self.state == "thought"

    def feed(self, text: str) -> list[Said]:
        """What is certain now; the beginning of what may become a mark waits."""
        self._waiting += text
        said: list[Said] = []
        while mark := self._first_mark():
            before, _, self._waiting = self._waiting.partition(mark.text)
            if self.state != "start":
                self._say(said, before)
            self.state, self._trimming = mark.to, True
        held = self._held()
        ready = self._waiting[: len(self._waiting) - held]
        self._waiting = self._waiting[len(ready) :]
        self._say(said, ready)
        return said

    def rest(self) -> list[Said]:
        """What was held back, when no more comes."""
        said: list[Said] = []
        ready, self._waiting = self._waiting, ""
        self._say(said, ready)
        return said

    def _say(self, said: list[Said], text: str) -> None:
        if self._trimming:
            text = text.lstrip()
        if not text:
            return
        self._trimming = False
        if self.state == "start":
            self.state = "answer"
        said.append(Said(text, thought=self.in_thought))

    def _first_mark(self) -> Mark | None:
        places = [
            (place, -len(mark.text), mark)
            for mark in self._marks
            if self.state in mark.seen_in and (place := self._waiting.find(mark.text)) >= 0
        ]
        # Before an answer only white space may stand before a thought.
        if self.state == "start":
            places = [found for found in places if not self._waiting[: found[0]].strip()]
        return min(places, key=lambda found: found[:2])[2] if places else None

    def _held(self) -> int:
        """Characters at the end that may begin a mark; white space that may stand before one."""
        text, state = self._waiting, self.state
        if state == "start":
            begun = text.lstrip()
            if any(mark.text.startswith(begun) for mark in self._marks if "start" in mark.seen_in):
                return len(text)
            state = "answer"
        marks = [mark.text for mark in self._marks if state in mark.seen_in]
        longest = min(max(map(len, marks), default=1) - 1, len(text))
        sizes = (n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks))
        return next(sizes, 0)
