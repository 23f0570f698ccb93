"""Generates one answer, token by token: :meth:`AnswerStream._tokens` is the decoding loop.

Tokens are selected from the model's logits and decoded to text that never ends within a character.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from threading import Event
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qlora_tui.chat.chat_types import FinishReason, GenerationResult, Sampling
from qlora_tui.data.thought_splitter import TextChunk, ThoughtSplitter

_SMALLEST_DIVISOR = 1e-5
"""Minimum temperature and penalty by which logits are divided. Smaller ones overflow float32."""


class TokenSampler:
    """Selects the tokens of one answer, on the device of the logits."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], device: torch.device) -> None:
        self._warp: Any = LogitsProcessorList()
        self._ids: Tensor | None = None
        """Tokens so far (1, tokens), if a sampling setting depends on them."""
        self._generator: torch.Generator | None = None
        if sampling.repetition_penalty != 1.0:
            penalty = max(sampling.repetition_penalty, _SMALLEST_DIVISOR)
            self._warp.append(RepetitionPenaltyLogitsProcessor(penalty))
            self._ids = torch.tensor([prompt], device=device)
        if sampling.temperature == 0:
            return
        self._warp.append(TemperatureLogitsWarper(max(sampling.temperature, _SMALLEST_DIVISOR)))
        if sampling.top_k:
            self._warp.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warp.append(TopPLogitsWarper(sampling.top_p))
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def next(self, logits: Tensor) -> Tensor:
        """Select and return the next token (1, 1) from logits (1, vocabulary)."""
        warped = self._warp(self._ids, logits.float())
        if self._generator is None:
            token: Tensor = warped.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(warped.softmax(-1), 1, generator=self._generator)
        if self._ids is not None:
            self._ids = torch.cat([self._ids, token], dim=1)
        return token


_BROKEN = "\ufffd"
"""Character that a decoder writes for bytes that are not (yet) a complete character."""
_LONGEST_CHARACTER = 4
"""Maximum number of bytes in a UTF-8 character, and therefore of tokens that it takes to complete a
character.
"""


class IncrementalDetokenizer:
    """Decodes token ids one at a time. The returned texts, joined, are the full text."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Start an empty text. ``decode`` returns the text of token ids, without special tokens."""
        self._decode = decode
        self._ids: list[int] = []
        # The previous piece is decoded again with the next one, because many decoders treat the beginning of
        # a text differently.
        self._context = 0
        self._given = 0

    def add(self, token_id: int) -> str:
        """Add a token id, and return the text that it completes, which is empty within a character."""
        self._ids.append(token_id)
        piece = self._pending_text()
        unfinished = piece.endswith(_BROKEN) and len(self._ids) - self._given < _LONGEST_CHARACTER
        return "" if unfinished else self._give(piece)

    def rest(self) -> str:
        """Return the text that is held back after the last id."""
        return self._give(self._pending_text())

    def _pending_text(self) -> str:
        before = self._decode(self._ids[self._context : self._given])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _give(self, piece: str) -> str:
        if piece:
            self._context, self._given = self._given, len(self._ids)
        return piece


PREFILL_CHUNK_TOKENS = 512
"""Prompt tokens processed in one forward pass. A stop request takes effect between two passes."""


class Prefix(Protocol):
    """Tokens that a model has already processed."""

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep the tokens that ``prompt`` begins with, but not the prompt's last one; return their number."""


Prefix_contra = TypeVar("Prefix_contra", bound=Prefix, contravariant=True)
AnyPrefix = TypeVar("AnyPrefix", bound=Prefix)


class DecoderModel(Protocol[Prefix_contra]):
    """The attributes and methods of a session that are needed to generate an answer."""

    device: torch.device
    context_length: int
    end_ids: frozenset[int]
    warning: str

    @property
    def prefill_tokens(self) -> int:
        """Return the maximum number of prompt tokens in one pass."""

    def next_logits(self, adapter_name: str, token_ids: list[int], prefix_cache: Prefix_contra) -> Tensor:
        """Return the logits (1, vocabulary) of the token after ``token_ids``."""

    def next_logits_ahead(
        self, adapter_name: str, token: Tensor, prefix_cache: Prefix_contra
    ) -> tuple[int, Tensor] | None:
        """Return the id of ``token`` (1, 1) and the logits after it from a CUDA graph, or None."""

    def take_note(self) -> str:
        """Return a note on how answers are generated, once; otherwise an empty text."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the ids without special tokens."""


class AnswerStream(Generic[AnyPrefix]):
    """An answer in progress. Iterate once over its chunks, then read ``outcome``."""

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
        """Stop the answer before its next token. May be called from any thread."""
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
            if len(answer) == self._max_new_tokens:
                is_full = len(answer) < self._sampling.max_new_tokens
                ending = "context full" if is_full else "most tokens"
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

    def _tokens(self, reused: int) -> Iterator[int]:
        """Yield the answer's token ids, up to the maximum or until stopped."""
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
                # This step was unnecessary if the token ends the turn.
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
        """Process ``token_ids`` in chunks.

        Returns the logits (1, vocabulary) after the last one; None after a stop request.
        """
        logits = None
        chunk = self._model.prefill_tokens
        for start in range(0, len(token_ids), chunk):
            if self._stop.is_set():
                return None
            logits = self._model.next_logits(
                self._adapter_name, token_ids[start : start + chunk], self._prefix_cache
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
        """Add the text of one token; yield the complete chunks, or all chunks with ``is_last``."""
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
