"""The engine's side: reads requests, writes replies, and holds one model.

The main thread does the work. A second thread reads requests, so that a stop request or the client's exit
takes effect during an answer.
"""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from qlora_tui.engine.data_service import DataService
from qlora_tui.engine.protocol import (
    Complete,
    CountTokens,
    Decide,
    Generate,
    InspectData,
    LoadChat,
    MeasureEffect,
    Message,
    OfferAdapters,
    Part,
    ReplyEnvelope,
    RequestEnvelope,
    ShowFields,
    ShowFormats,
    ShowRow,
    Stop,
    Unload,
    decode_request,
    encode,
    encode_value,
    log_path,
)
from qlora_tui.errors import EXIT_FAILURE, INTERNAL_ERROR, UserError
from qlora_tui.gpu.cuda_errors import breaks_process, cuda_problem
from qlora_tui.gpu.torch_env import faster_imports
from qlora_tui.worker import Failure, Progress, Result

if TYPE_CHECKING:
    from qlora_tui.engine.chat_service import ChatService


class Server:
    """Serves one client until the client closes the pipe."""

    def __init__(self, questions: BinaryIO, replies: BinaryIO) -> None:
        self._questions = questions
        self._replies = replies
        self._waiting: queue.SimpleQueue[RequestEnvelope] = queue.SimpleQueue()
        self._stops: dict[int, threading.Event] = {}
        self._active: dict[int, Generator[Any, None, Any]] = {}
        self._adapter_names: dict[int, str] = {}
        self._chat_service: ChatService | None = None
        self._data_service = DataService()

    def run(self) -> None:
        """Work until the client exits, when the reading thread ends the process."""
        threading.Thread(target=self._read, daemon=True).start()
        with suppress(BrokenPipeError):
            while True:
                if not self._active or not self._waiting.empty():
                    self._start(self._waiting.get())
                # Answers take turns, one piece each, so that concurrent requests progress together.
                for number in list(self._active):
                    self._advance(number)

    def _read(self) -> None:
        try:
            for line in self._questions:
                self._dispatch(decode_request(line))
        except msgspec.MsgspecError:
            traceback.print_exc()
        # The client has exited or sends invalid messages, so nothing waits for the main thread's result.
        os._exit(0)

    def _dispatch(self, envelope: RequestEnvelope) -> None:
        if isinstance(envelope.request, Stop):
            if (stop := self._stops.get(envelope.request.request_number)) is not None:
                stop.set()
            return
        self._stops[envelope.number] = threading.Event()
        self._waiting.put(envelope)

    def _start(self, envelope: RequestEnvelope) -> None:
        match envelope.request:
            case LoadChat() | Unload():
                self._end_answers(list(self._active))
            case Generate(adapter_name=adapter_name):
                # Each adapter has one answer at a time.
                self._end_answers([n for n in self._active if self._adapter_names.get(n) == adapter_name])
                self._adapter_names[envelope.number] = adapter_name
        self._active[envelope.number] = self._work(envelope)

    def _end_answers(self, numbers: list[int]) -> None:
        for number in numbers:
            self._stops[number].set()
            while number in self._active:
                self._advance(number)

    def _advance(self, number: int) -> None:
        is_gpu_lost = False
        reply: Message
        try:
            value = next(self._active[number])
            if value is None:  # there is nothing to send yet
                return
            reply = Part(encode_value(value))
        except StopIteration as end:
            reply = Result(encode_value(end.value))
        except UserError as problem:
            reply = Failure(**problem.fields())
        except Exception as error:
            problem_of_gpu = cuda_problem(error)
            reply = Failure(**problem_of_gpu.fields()) if problem_of_gpu else _internal_error(error)
            is_gpu_lost = breaks_process(error)
        self._send(number, reply)
        if is_gpu_lost:
            # The client starts another engine for its next request.
            os._exit(EXIT_FAILURE)
        if not isinstance(reply, Part):
            del self._active[number]
            del self._stops[number]
            self._adapter_names.pop(number, None)

    def _send(self, number: int, reply: Message) -> None:
        self._replies.write(encode(ReplyEnvelope(number, reply)))
        self._replies.flush()

    def _work(self, envelope: RequestEnvelope) -> Generator[Any, None, Any]:
        """Yield the parts of the reply to a request, and return its result. Other requests can continue
        after each part.

        A yielded None is not sent. It only lets other requests continue.
        """
        number, request = envelope.number, envelope.request

        def on_status(words: str) -> None:
            self._send(number, Progress(text=words))

        match request:
            case LoadChat():
                return self._with_torch(on_status).load(request, on_status)
            case OfferAdapters(adapters=adapters):
                self._with_torch(on_status).offer(adapters)
            case Generate():
                return (yield from self._with_torch(on_status).generate(request, self._stops[number]))
            case Complete(completion=completion):
                return (yield from self._with_torch(on_status).complete(completion, self._stops[number]))
            case InspectData():
                return (yield from self._data_service.inspect(request, self._stops[number]))
            case ShowRow():
                return self._data_service.show(request)
            case ShowFields():
                return self._data_service.fields(request)
            case ShowFormats():
                return self._data_service.formats(request)
            case Decide():
                return self._with_torch(on_status).decide(request)
            case MeasureEffect():
                return self._with_torch(on_status).measure(request, on_status, self._stops[number])
            case CountTokens():
                return self._with_torch(on_status).count(request)
            case Unload():
                if self._chat_service is not None:
                    self._chat_service.unload()
        return None

    def _with_torch(self, on_status: Callable[[str], None]) -> ChatService:
        if self._chat_service is None:
            on_status("Starting the engine")
            with faster_imports():
                from qlora_tui.engine.chat_service import ChatService

            self._chat_service = ChatService()
        return self._chat_service


def _internal_error(error: Exception) -> Failure:
    traceback.print_exc()
    return Failure(
        title=INTERNAL_ERROR,
        what=f"{type(error).__name__}: {error}",
        fix=f"The traceback is in {log_path()}.",
    )
