"""Chat in the engine: load, generate, unload. Loads torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from threading import Event

from qlora_tui.chat.chat_types import BASE, Decided, Effect, GenerationResult
from qlora_tui.chat.completion_types import Completion, CompletionPart, CompletionResult
from qlora_tui.chat.decide import decide_one, decider_of
from qlora_tui.chat.decoding import PrefixCache
from qlora_tui.chat.generation import AnswerStream
from qlora_tui.chat.loading import load_session
from qlora_tui.chat.session import ChatSession, reported_memory
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.engine.protocol import ChatReady, CountTokens, Decide, Generate, LoadChat, MeasureEffect
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.export.gguf_chat import GgufDecoder
from qlora_tui.training.host import release_gpu_memory


class ChatService:
    """Serves chat requests with at most one loaded session."""

    def __init__(self) -> None:
        self._session: ChatSession | None = None
        self._gguf_decoders: dict[str, GgufDecoder] = {}

    def load(self, request: LoadChat, on_status: Callable[[str], None]) -> ChatReady:
        """Load a model, replacing the current one. Raises UserError."""
        self.unload()
        began = time.perf_counter()
        session = load_session(request.source, on_status, streams=True)
        self._session = session
        return ChatReady(
            adapter_names=session.source.answer_names,
            device=session.compute_device.name,
            dtype=session.compute_device.dtype_name,
            context_tokens=session.context_length,
            seconds=time.perf_counter() - began,
            memory_bytes=session.memory_bytes,
            thinking=session.thinking,
            decides=decider_of(session.source, BASE) is not None,
        )

    def offer(self, adapters: dict[str, str]) -> None:
        """Replace the available adapters. Raises UserError if no model is loaded."""
        self._loaded().offer(adapters)

    def generate(self, request: Generate, stop: Event) -> Generator[TextChunk, None, GenerationResult]:
        """Yield an answer in pieces, and return its result. Raises UserError."""
        session = self._loaded()
        reply: AnswerStream[PrefixCache] | AnswerStream[GgufDecoder]
        if request.adapter_name in session.source.gguf_files:
            reply = self._gguf(session, request.adapter_name).ask(
                request.adapter_name,
                request.messages,
                sampling=request.sampling,
                stop=stop,
                thinking=request.thinking,
            )
        else:
            reply = session.ask(
                request.messages,
                adapter_name=request.adapter_name,
                sampling=request.sampling,
                stop=stop,
                thinking=request.thinking,
            )
        with reported_memory(session.compute_device):
            yield from reply
        assert reply.outcome is not None
        if reply.outcome.note:
            # This is for the engine's log, because the user need not act on it.
            print(reply.outcome.note, file=sys.stderr)
        return reply.outcome

    def complete(
        self, completion: Completion, stop: Event
    ) -> Generator[CompletionPart | None, None, CompletionResult]:
        """Yield a completion in pieces, and return its result. Raises UserError.

        Yields None between the pieces, so that other requests can continue.
        """
        session = self._loaded()
        with reported_memory(session.compute_device):
            result = yield from session.complete(completion, stop).run()
        if result.note:
            print(result.note, file=sys.stderr)
        return result

    def decide(self, request: Decide) -> Decided:
        """Return the probability of each option. Raises UserError."""
        return decide_one(self._loaded(), request.adapter_name, request.messages)

    def measure(self, request: MeasureEffect, on_status: Callable[[str], None], stop: Event) -> Effect:
        """Compare an adapter with the base. Raises UserError."""
        # Imported here because it imports peft, which takes seconds.
        from qlora_tui.chat.effect_measurement import measure_effect

        session = self._loaded()
        if request.adapter_name in session.source.gguf_files:
            raise UserError(
                "The effect of a GGUF file cannot be measured",
                what="The effect is measured by comparing an adapter with its base.",
                fix="Choose the adapter instead; the export already compared this file with it.",
                exit_code=EXIT_USAGE,
            )
        with reported_memory(session.compute_device):
            return measure_effect(session, request.adapter_name, on_status=on_status, stop=stop)

    def count(self, request: CountTokens) -> int:
        """Count the tokens of a text. Raises UserError."""
        return self._loaded().count_tokens(request.text)

    def unload(self) -> None:
        """Unload the model and free its memory."""
        self._session = None
        for decoder in self._gguf_decoders.values():
            decoder.close()
        self._gguf_decoders.clear()
        release_gpu_memory()

    def _gguf(self, session: ChatSession, name: str) -> GgufDecoder:
        if name not in self._gguf_decoders:
            self._gguf_decoders[name] = GgufDecoder(session, session.source.gguf_files[name])
        return self._gguf_decoders[name]

    def _loaded(self) -> ChatSession:
        if self._session is None:
            raise UserError(
                "No model is loaded",
                what="No model is loaded in the engine.",
                fix="Load the chat again.",
                exit_code=EXIT_USAGE,
            )
        return self._session
