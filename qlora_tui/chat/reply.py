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
from qlora_tui.chat.terms import Ending, Outcome, Sampling
from qlora_tui.chat.text_stream import TextStream

_READ_AT_ONCE = 512
"""Tokens of a prompt between two looks at whether to stop."""


class Speaker(Protocol):
    """What an answer needs of the session: one voice of its model."""

    device: torch.device
    context_length: int
    end_ids: frozenset[int]

    def read(self, voice: str, token_ids: list[int], kept: Kept) -> Tensor:
        """Scores (1, vocabulary) of what comes after ``token_ids``."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Their text, special tokens left out."""


class Reply:
    """An answer in the making. Iterate once, for pieces of its text; ``outcome`` is there at the end."""

    def __init__(
        self,
        speaker: Speaker,
        voice: str,
        prompt: list[int],
        kept: Kept,
        sampling: Sampling,
        stop: Event,
    ) -> None:
        self._speaker = speaker
        self._voice = voice
        self._prompt = prompt
        self._kept = kept
        self._sampling = sampling
        self._stop = stop
        self.outcome: Outcome | None = None

    def stop(self) -> None:
        """End the answer before its next token. Any thread may call this."""
        self._stop.set()

    def __iter__(self) -> Iterator[str]:
        began = time.perf_counter()
        first_at = began
        stream = TextStream(self._speaker.decode)
        reused = self._kept.reuse(self._prompt)
        answer: list[int] = []
        text = ""
        ending: Ending = "stopped"
        for token_id in self._tokens(reused):
            if not answer:
                first_at = time.perf_counter()
            answer.append(token_id)
            if token_id in self._speaker.end_ids:
                ending = "turn end"
                break
            if piece := stream.add(token_id):
                text += piece
                yield piece
        else:
            ending = self._why_no_more(len(answer))
        if piece := stream.rest():
            text += piece
            yield piece
        ended = time.perf_counter()
        self.outcome = Outcome(
            ending=ending,
            text=text,
            prompt_tokens=len(self._prompt),
            reused_tokens=reused,
            new_tokens=len(answer),
            first_token_s=first_at - began,
            tokens_per_s=(len(answer) - 1) / (ended - first_at) if len(answer) > 1 else 0.0,
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
