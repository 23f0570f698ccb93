"""Generates one answer, token by token: :meth:`AnswerStream._tokens` is the decoding loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from threading import Event
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from qlora_tui.chat.chat_types import FinishReason, GenerationResult, Sampling
from qlora_tui.chat.incremental_detokenizer import IncrementalDetokenizer
from qlora_tui.chat.token_sampler import TokenSampler
from qlora_tui.data.thought_splitter import TextChunk, ThoughtSplitter

PREFILL_CHUNK_TOKENS = 512
"""Prompt tokens in one forward pass: a stop request is noticed between two."""


class Prefix(Protocol):
    """Tokens that a model has processed already."""

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep the common prefix with ``prompt``, without its last token; return its length in tokens."""


Prefix_contra = TypeVar("Prefix_contra", bound=Prefix, contravariant=True)
AnyPrefix = TypeVar("AnyPrefix", bound=Prefix)


class DecoderModel(Protocol[Prefix_contra]):
    """Methods of the session that an answer needs."""

    device: torch.device
    context_length: int
    end_ids: frozenset[int]
    warning: str

    def next_logits(self, adapter_name: str, token_ids: list[int], prefix_cache: Prefix_contra) -> Tensor:
        """Return the logits (1, vocabulary) of the token after ``token_ids``."""

    def next_logits_ahead(
        self, adapter_name: str, token: Tensor, prefix_cache: Prefix_contra
    ) -> tuple[int, Tensor] | None:
        """Return the id of ``token`` (1, 1) and the logits after it from a CUDA graph; None without one."""

    def take_note(self) -> str:
        """Return a note on how answers are generated, once; else an empty text."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the ids without special tokens."""


class AnswerStream(Generic[AnyPrefix]):
    """An answer while it is generated. Iterate once over its chunks, then read ``outcome``."""

    def __init__(
        self,
        model: DecoderModel[AnyPrefix],
        adapter_name: str,
        prompt: list[int],
        prefix_cache: AnyPrefix,
        sampling: Sampling,
        stop: Event,
        splitter: ThoughtSplitter,
    ) -> None:
        self._model = model
        self._adapter_name = adapter_name
        self._prompt = prompt
        self._prefix_cache = prefix_cache
        self._sampling = sampling
        self._stop = stop
        self._splitter = splitter
        self._recorded_tokens = 0
        self.outcome: GenerationResult | None = None

    def stop(self) -> None:
        """Stop the answer before its next token. Callable from any thread."""
        self._stop.set()

    def __iter__(self) -> Iterator[TextChunk]:
        began = time.perf_counter()
        first_at = began
        stream, parts = IncrementalDetokenizer(self._model.decode), _AnswerParts(self._splitter)
        reused = self._prefix_cache.reuse(self._prompt)
        answer: list[int] = []
        ending: FinishReason = "stopped"
        for token_id in self._tokens(reused):
            if not answer:
                first_at = time.perf_counter()
                parts.began_at = first_at
            answer.append(token_id)
            if token_id in self._model.end_ids:
                ending = "turn end"
                break
            yield from parts.add_text(stream.add(token_id))
        else:
            ending = self._limit_reached(len(answer))
        yield from parts.add_text(stream.rest(), is_last=True)
        ended = time.perf_counter()
        self.outcome = GenerationResult(
            ending=ending,
            text=parts.answer,
            prompt_tokens=len(self._prompt),
            reused_tokens=reused,
            new_tokens=len(answer),
            first_token_s=first_at - began,
            tokens_per_s=(len(answer) - 1) / (ended - first_at) if len(answer) > 1 else 0.0,
            recorded_tokens=self._recorded_tokens,
            warning=self._model.warning,
            note=self._model.take_note(),
            thought=parts.thought.strip(),
            thought_tokens=parts.thought_tokens,
            thought_s=parts.thought_s,
            thought_ended=not parts.thought or not self._splitter.in_thought,
        )

    @property
    def _max_new_tokens(self) -> int:
        return min(self._sampling.max_new_tokens, self._model.context_length - len(self._prompt))

    def _limit_reached(self, answered: int) -> FinishReason:
        if answered < self._max_new_tokens:
            return "stopped"
        return "most tokens" if answered == self._sampling.max_new_tokens else "context full"

    def _tokens(self, reused: int) -> Iterator[int]:
        """Yield the answer's ids, up to the maximum or until stopped."""
        sampler = TokenSampler(self._sampling, self._prompt, self._model.device)
        logits = self._forward(self._prompt[reused:])
        for further in reversed(range(self._max_new_tokens)):
            if logits is None:
                return
            token = sampler.next(logits)
            ahead = None
            if further:
                ahead = self._model.next_logits_ahead(self._adapter_name, token, self._prefix_cache)
            if ahead is not None:
                # At the end of a turn this step was not needed.
                token_id, logits = ahead
                self._recorded_tokens += 1
                yield token_id
                if self._stop.is_set():
                    return
            else:
                token_id = int(token)
                yield token_id
                logits = self._forward([token_id]) if further else None

    def _forward(self, token_ids: list[int]) -> Tensor | None:
        """Run ``token_ids`` through the model in chunks.

        Returns the logits (1, vocabulary) after the last one; None after a stop request.
        """
        logits = None
        for start in range(0, len(token_ids), PREFILL_CHUNK_TOKENS):
            if self._stop.is_set():
                return None
            logits = self._model.next_logits(
                self._adapter_name, token_ids[start : start + PREFILL_CHUNK_TOKENS], self._prefix_cache
            )
        return logits


class _AnswerParts:
    """Text generated so far, with thoughts and answer separated."""

    def __init__(self, splitter: ThoughtSplitter) -> None:
        self._splitter = splitter
        self.answer = ""
        self.thought = ""
        self.thought_tokens = 0
        self.thought_s = 0.0
        self.began_at = 0.0
        """Time of the first token."""

    def add_text(self, text: str, *, is_last: bool = False) -> Iterator[TextChunk]:
        """Yield the chunks that one more token completes; with ``is_last``, all the rest."""
        was_in_thought = self._splitter.in_thought
        pieces = self._splitter.feed(text) + (self._splitter.rest() if is_last else [])
        if was_in_thought:
            self.thought_s = time.perf_counter() - self.began_at
            if self._splitter.in_thought and not is_last:
                self.thought_tokens += 1
        for piece in pieces:
            if piece.thought:
                self.thought += piece.text
                yield TextChunk(piece.text, True, self.thought_tokens)
            else:
                self.answer += piece.text
                yield piece
