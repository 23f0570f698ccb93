"""One answer, token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from threading import Event
from typing import Protocol

import torch
from torch import Tensor

from qlora_tui.chat.choose import chooser
from qlora_tui.chat.kept import Kept
from qlora_tui.chat.terms import Ending, Outcome, Said, Sampling
from qlora_tui.chat.text_stream import TextStream
from qlora_tui.chat.thoughts import ThoughtSplitter

_READ_AT_ONCE = 512
"""Tokens of a prompt between two looks at whether to stop."""


class Speaker(Protocol):
    """What an answer needs of the session: one voice of its model."""

    device: torch.device
    context_length: int
    end_ids: frozenset[int]
    warning: str

    def read(self, voice: str, token_ids: list[int], kept: Kept) -> Tensor:
        """Scores (1, vocabulary) of what comes after ``token_ids``."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Their text, special tokens left out."""


class Reply:
    """An answer in the making. Iterate once, for pieces of thought and answer; then ``outcome`` is there."""

    def __init__(
        self,
        speaker: Speaker,
        voice: str,
        prompt: list[int],
        kept: Kept,
        sampling: Sampling,
        stop: Event,
        splitter: ThoughtSplitter,
    ) -> None:
        self._speaker = speaker
        self._voice = voice
        self._prompt = prompt
        self._kept = kept
        self._sampling = sampling
        self._stop = stop
        self._splitter = splitter
        self.outcome: Outcome | None = None

    def stop(self) -> None:
        """End the answer before its next token. Any thread may call this."""
        self._stop.set()

    def __iter__(self) -> Iterator[Said]:
        began = time.perf_counter()
        first_at = began
        stream, said = TextStream(self._speaker.decode), _Heard(self._splitter)
        reused = self._kept.reuse(self._prompt)
        answer: list[int] = []
        ending: Ending = "stopped"
        for token_id in self._tokens(reused):
            if not answer:
                first_at = time.perf_counter()
                said.began_at = first_at
            answer.append(token_id)
            if token_id in self._speaker.end_ids:
                ending = "turn end"
                break
            yield from said.hear(stream.add(token_id))
        else:
            ending = self._why_no_more(len(answer))
        yield from said.hear(stream.rest(), is_last=True)
        ended = time.perf_counter()
        self.outcome = Outcome(
            ending=ending,
            text=said.answer,
            prompt_tokens=len(self._prompt),
            reused_tokens=reused,
            new_tokens=len(answer),
            first_token_s=first_at - began,
            tokens_per_s=(len(answer) - 1) / (ended - first_at) if len(answer) > 1 else 0.0,
            warning=self._speaker.warning,
            thought=said.thought.strip(),
            thought_tokens=said.thought_tokens,
            thought_s=said.thought_s,
            thought_ended=not said.thought or not self._splitter.in_thought,
        )

    @property
    def _most_tokens(self) -> int:
        return min(self._sampling.max_new_tokens, self._speaker.context_length - len(self._prompt))

    def _why_no_more(self, answered: int) -> Ending:
        if answered < self._most_tokens:
            return "stopped"
        return "most tokens" if answered == self._sampling.max_new_tokens else "context full"

    def _tokens(self, reused: int) -> Iterator[int]:
        """The answer's ids, up to the most there may be or until stopped."""
        choose = chooser(self._sampling, self._speaker.device)
        ids = torch.tensor([self._prompt], device=self._speaker.device)
        unread = self._prompt[reused:]
        for _ in range(self._most_tokens):
            scores = self._read(unread)
            if scores is None:
                return
            token_id = choose(ids, scores)
            ids = torch.cat([ids, ids.new_tensor([[token_id]])], dim=1)
            unread = [token_id]
            yield token_id

    def _read(self, token_ids: list[int]) -> Tensor | None:
        """Scores after ``token_ids``; None when asked to stop."""
        scores = None
        for start in range(0, len(token_ids), _READ_AT_ONCE):
            if self._stop.is_set():
                return None
            scores = self._speaker.read(self._voice, token_ids[start : start + _READ_AT_ONCE], self._kept)
        return scores


class _Heard:
    """What has been said so far, thoughts and answer apart."""

    def __init__(self, splitter: ThoughtSplitter) -> None:
        self._splitter = splitter
        self.answer = ""
        self.thought = ""
        self.thought_tokens = 0
        self.thought_s = 0.0
        self.began_at = 0.0
        """When the first token came."""

    def hear(self, text: str, *, is_last: bool = False) -> Iterator[Said]:
        """The pieces that one more token makes certain; with ``is_last``, all that is left."""
        was_in_thought = self._splitter.in_thought
        pieces = self._splitter.feed(text) + (self._splitter.rest() if is_last else [])
        if was_in_thought:
            self.thought_s = time.perf_counter() - self.began_at
            if self._splitter.in_thought and not is_last:
                self.thought_tokens += 1
        for piece in pieces:
            if piece.thought:
                self.thought += piece.text
                yield Said(piece.text, True, self.thought_tokens)
            else:
                self.answer += piece.text
                yield piece
