"""The engine's side: questions in, replies out, one model held.

The main thread does the work. A second one reads questions, so that a stop, or the end of whoever asks, takes
effect in the middle of an answer.
"""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from qlora_tui.engine.place import log_path
from qlora_tui.engine.previews import Previews
from qlora_tui.engine.protocol import (
    Answered,
    AnyReply,
    Asked,
    Failure,
    Generate,
    InspectData,
    LoadChat,
    MeasureEffect,
    ShowFields,
    ShowRow,
    Stage,
    Stop,
    Unload,
    Unloaded,
    decode_asked,
    encode,
)
from qlora_tui.errors import UserError

if TYPE_CHECKING:
    from qlora_tui.engine.chats import Chats


class Server:
    """Serves one client until its end of the pipe closes."""

    def __init__(self, questions: BinaryIO, replies: BinaryIO) -> None:
        self._questions = questions
        self._replies = replies
        self._waiting: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        self._stops: dict[int, threading.Event] = {}
        self._growing: dict[int, Iterator[AnyReply]] = {}
        self._adapter_names: dict[int, str] = {}
        self._chats: Chats | None = None
        self._previews = Previews()

    def run(self) -> None:
        """Work until the client is gone; then the process ends from the reading thread."""
        threading.Thread(target=self._read, daemon=True).start()
        with suppress(BrokenPipeError):
            while True:
                if not self._growing or not self._waiting.empty():
                    self._take(self._waiting.get())
                # Answers take turns, a piece each, so that those asked together grow side by side.
                for number in list(self._growing):
                    self._grow(number)

    def _read(self) -> None:
        try:
            for line in self._questions:
                self._sort(decode_asked(line))
        except msgspec.MsgspecError:
            traceback.print_exc()
        # The client is gone, or talks nonsense. Whatever the main thread is in the middle of, nobody waits
        # for it any more.
        os._exit(0)

    def _sort(self, asked: Asked) -> None:
        if isinstance(asked.request, Stop):
            if (stop := self._stops.get(asked.request.asked)) is not None:
                stop.set()
            return
        self._stops[asked.number] = threading.Event()
        self._waiting.put(asked)

    def _take(self, asked: Asked) -> None:
        match asked.request:
            case LoadChat() | Unload():
                self._end_answers(list(self._growing))
            case Generate(adapter_name=adapter_name):
                # A voice says one thing at a time.
                self._end_answers([n for n in self._growing if self._adapter_names.get(n) == adapter_name])
                self._adapter_names[asked.number] = adapter_name
        self._growing[asked.number] = self._work(asked)

    def _end_answers(self, numbers: list[int]) -> None:
        for number in numbers:
            self._stops[number].set()
            while number in self._growing:
                self._grow(number)

    def _grow(self, number: int) -> None:
        try:
            reply = next(self._growing[number])
        except UserError as problem:
            reply = Failure.of(problem)
        except Exception as error:
            reply = _mistake(error)
        self._send(number, reply)
        if reply.final:
            del self._growing[number]
            del self._stops[number]
            self._adapter_names.pop(number, None)

    def _send(self, number: int, reply: AnyReply) -> None:
        self._replies.write(encode(Answered(number, reply)))
        self._replies.flush()

    def _work(self, asked: Asked) -> Iterator[AnyReply]:
        """The replies to a question; each ``next`` does a little of the work."""
        number, request = asked.number, asked.request

        def on_status(words: str) -> None:
            self._send(number, Stage(words=words))

        match request:
            case LoadChat():
                yield self._with_torch(on_status).load(request, on_status)
            case Generate():
                yield from self._with_torch(on_status).generate(request, self._stops[number])
            case InspectData():
                yield from self._previews.inspect(request, self._stops[number])
            case ShowRow():
                yield self._previews.show(request)
            case ShowFields():
                yield self._previews.fields(request)
            case MeasureEffect():
                yield self._with_torch(on_status).measure(request, on_status, self._stops[number])
            case Unload():
                if self._chats is not None:
                    self._chats.unload()
                yield Unloaded()

    def _with_torch(self, on_status: Callable[[str], None]) -> Chats:
        if self._chats is None:
            on_status("Starting the engine")
            from qlora_tui.engine.chats import Chats

            self._chats = Chats()
        return self._chats


def _mistake(error: Exception) -> Failure:
    traceback.print_exc()
    return Failure(
        title="A mistake of ours",
        what=f"{type(error).__name__}: {error}",
        fix=f"The traceback is in {log_path()}.",
    )
