"""Lines of JSON on a worker process's stdout: its progress, or the error that ended it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from msgspec import Struct

from qlora_tui.decoding import decode_json
from qlora_tui.errors import UserError


class WorkerMessage(Struct, frozen=True, omit_defaults=True):
    """One line; an error where it has a title."""

    done: int = 0
    total: int = 0
    """In the unit of the worker: bytes written, or passes over samples."""
    title: str = ""
    what: str = ""
    why: str = ""
    fix: str = ""


_DECODER = msgspec.json.Decoder(WorkerMessage)


def send_progress(done: int, total: int) -> None:
    """Print progress."""
    _send(WorkerMessage(done=done, total=total))


def send_error(error: UserError) -> None:
    """Print the error that ends the worker."""
    _send(WorkerMessage(title=error.title, what=error.what, why=error.why, fix=error.fix))


def read_messages(lines: Iterable[bytes], progress: Callable[[int, int], None]) -> UserError | None:
    """Read a worker's lines to their end; return the error that it reported.

    Args:
        lines: from its stdout; one that a library printed is left out.
        progress: called with each message's ``done`` and ``total``.
    """
    error = None
    for line in lines:
        try:
            message = decode_json(line, _DECODER)
        except msgspec.MsgspecError:
            continue
        if message.title:
            error = UserError(message.title, what=message.what, why=message.why, fix=message.fix)
        else:
            progress(message.done, message.total)
    return error


def _send(message: WorkerMessage) -> None:
    print(msgspec.json.encode(message).decode(), flush=True)
