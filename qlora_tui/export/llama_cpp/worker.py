"""The process that runs llama.cpp for ``client``: calls on stdin, replies on stdout, its log on stderr.

A call is a line of JSON with the name of a function and its arguments. The reply is a line of JSON, followed
by as many floats as it announces.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any, NoReturn

import msgspec
import numpy as np

from qlora_tui.export.llama_cpp.bindings import LlamaCpp, LlamaCppError, LlamaModel
from qlora_tui.export.llama_cpp.client import Reply

_CALLS = msgspec.json.Decoder(tuple[str, tuple[Any, ...]])


class _Worker:
    """Holds the open file."""

    def __init__(self) -> None:
        self._llama = LlamaCpp()
        self._stack = ExitStack()
        self._model: LlamaModel

    def do(self, function: str, arguments: tuple[Any, ...]) -> Any:
        match function:
            case "load":
                return None
            case "quantize":
                return self._llama.quantize(*arguments)
            case "open":
                path, context, exact = arguments
                self._model = self._stack.enter_context(self._llama.open(path, context=context, exact=exact))
                return self._model.vocabulary_size
        return getattr(self._model, function)(*arguments)


def main() -> NoReturn:
    """Serve calls until stdin closes, then end the process."""
    # llama.cpp prints to stdout too, so its stdout must be stderr.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    calls: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read, args=(calls,), daemon=True).start()
    worker: _Worker | None = None
    while True:
        data = b""
        try:
            worker = worker or _Worker()
            value = worker.do(*_CALLS.decode(calls.get()))
            if isinstance(value, np.ndarray):
                data = value.tobytes()
                reply = Reply(floats=value.size)
            else:
                reply = Reply(value)
        except (LlamaCppError, OSError) as error:
            reply = Reply(failure=str(error) or type(error).__name__)
        replies.write(msgspec.json.encode(reply) + b"\n" + data)
        replies.flush()


def _read(calls: SimpleQueue[bytes]) -> None:
    """Read calls. When stdin closes, end the process, even during a call, because the parent has ended."""
    for line in sys.stdin.buffer:
        calls.put(line)
    os._exit(1)


if __name__ == "__main__":
    main()
