"""``store``: the box's side of ``qlora-tui --host``, which ssh starts there.

Sends changes in the runs of this machine, and executes the requests of the app, over stdin and stdout. Ends
with the connection, after requests in progress are completed and their outcomes recorded, so that no request
is executed twice.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui import paths
from qlora_tui.cli.subcommand import CommandResult, Subcommand
from qlora_tui.errors import EXIT_FAILURE, INTERNAL_ERROR, UserError
from qlora_tui.files import private_dir
from qlora_tui.remote import messages
from qlora_tui.remote.messages import (
    Call,
    FromBox,
    Gone,
    Hello,
    Known,
    KnownFile,
    Machine,
    Piece,
    Queue,
    Reply,
    Whole,
)
from qlora_tui.remote.mirror import end_crc, grows, read_piece
from qlora_tui.remote.uploads import receive_from_stdin
from qlora_tui.runs.directory import RunDir, all_runs, waiting
from qlora_tui.runs.status import ACTIVE, Status, read_status
from qlora_tui.worker import DETACHED, PROGRAM, module_argv, subprocess_env

_TICK_S = 1.0
_POLL_S = 0.1
_SWEEP_S = 10.0
"""Seconds between two scans of the folders of ended runs."""
_APP_GONE_S = 60.0
"""Seconds without a message from the app after which this process ends."""
_KEPT_S = 7 * 24 * 3600.0
"""Seconds for which the outcome of a request is stored."""
_PIECE_BYTES = 1 << 20
_UNSENT = ("heartbeat.json", "status.json")
"""Files that are not sent. This process sends the status that it determines, with the heartbeat, instead."""


def run(args: argparse.Namespace) -> CommandResult | int:
    """Stream the runs, receive data, or run an engine or a job; return the exit code."""
    if args.action == "receive":
        return receive_from_stdin()
    if args.action in ("engine", "job"):
        program = ("qlora_tui.engine",) if args.action == "engine" else (PROGRAM, args.job, DETACHED)
        argv = module_argv(*program)
        os.execve(argv[0], argv, subprocess_env())
    return _Stream().run()


class _Stream:
    """The stream to one app that follows this machine."""

    def __init__(self) -> None:
        self._output = os.fdopen(os.dup(1), "wb")
        # Output of libraries must not mix with the messages.
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self._heard_at = time.monotonic()
        self._ended = threading.Event()
        self._calls = ThreadPoolExecutor(8)

    def run(self) -> int:
        """Serve until the connection ends; return the exit code."""
        from qlora_tui.runs.actions import KEPT_S, empty_trash
        from qlora_tui.tui.system_monitor import SystemMonitor  # does not load textual

        known = messages.to_box_decoder.decode(sys.stdin.buffer.readline())
        if not isinstance(known, Known):
            return EXIT_FAILURE
        empty_trash(KEPT_S)
        _forget_old_requests()
        self._send(Hello(str(paths.state_dir())))
        threading.Thread(target=self._read, daemon=True).start()
        files, monitor = _RunFiles(known.files), SystemMonitor()
        while not self._ended.is_set():
            for change in files.changes():
                self._send(change)
            self._send(Machine(messages.to_json(monitor.poll_and_recover())))
            self._ended.wait(_TICK_S)
            if time.monotonic() - self._heard_at > _APP_GONE_S:
                break
        # Requests in progress are completed, and their outcomes recorded.
        self._calls.shutdown(wait=True)
        return 0

    def _read(self) -> None:
        with suppress(OSError, msgspec.MsgspecError):
            for line in sys.stdin.buffer:
                self._heard_at = time.monotonic()
                message = messages.to_box_decoder.decode(line)
                if isinstance(message, Call):
                    self._calls.submit(self._answer, message)
        self._ended.set()

    def _answer(self, call: Call) -> None:
        try:
            reply = _once(call, self._ended) if call.changes else _reply(call)
        except (OSError, ValueError) as error:
            what = f"The request could not be recorded on {os.uname().nodename}: {error}."
            problem = UserError(
                "The request was not carried out", what=what, fix="Check the disk of that machine."
            )
            reply = Reply(call.id, error=messages.to_json(problem))
        self._send(reply)

    def _send(self, message: FromBox) -> None:
        try:
            line = messages.line(message)
        except UnicodeEncodeError:
            return  # for a file whose name is not UTF-8, JSON cannot hold the path
        with self._lock:
            try:
                self._output.write(line)
                self._output.flush()
            except (OSError, ValueError):
                self._ended.set()


def _reply(call: Call) -> Reply:
    try:
        return Reply(call.id, value=messages.call_function(call.function, call.arguments))
    except UserError as error:
        return Reply(call.id, error=messages.to_json(error))
    except Exception as error:
        traceback.print_exc()
        what = f"{call.function}: {type(error).__name__}: {error}"
        fix = "This is a bug in qlora-tui: report it."
        return Reply(call.id, error=messages.to_json(UserError(INTERNAL_ERROR, what=what, fix=fix)))


class _Record(Struct, frozen=True):
    """The record of a request."""

    reply: Reply | None
    """The outcome; None while the request is being executed."""


_RECORDS = msgspec.json.Decoder(_Record)


def _once(call: Call, app_gone: threading.Event) -> Reply:
    """Execute a request unless this was done before; return the outcome. Raises OSError and ValueError."""
    if not call.id.isalnum():
        raise ValueError(call.id)
    handle = os.open(_requests_dir() / f"{call.id}.json", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "r+b") as file:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            # The process of a dropped connection executes the request. Wait while the app is there.
            if app_gone.wait(_POLL_S):
                raise InterruptedError(call.id)
        if record := file.read():
            with suppress(msgspec.MsgspecError):
                if (reply := _RECORDS.decode(record).reply) is not None:
                    return reply
            return Reply(call.id, error=messages.to_json(_interrupted(call)))
        _write_record(handle, _Record(None))
        reply = _reply(call)
        # If the disk is full, the record keeps saying that the outcome is unknown.
        with suppress(OSError):
            _write_record(handle, _Record(reply))
    return reply


def _write_record(handle: int, record: _Record) -> None:
    """Write a record over a shorter one, or into an empty file. Raises OSError."""
    os.pwrite(handle, msgspec.json.encode(record), 0)
    os.fsync(handle)


def _interrupted(call: Call) -> UserError:
    return UserError(
        "The request may have been carried out",
        what=f"{call.function.rpartition(':')[2]} was interrupted on {os.uname().nodename}.",
        why="The process that carried out the request was killed.",
        fix="Check the list of runs before you try again.",
    )


def _requests_dir() -> Path:
    return private_dir(paths.state_dir() / "requests")


def _forget_old_requests() -> None:
    for file in _requests_dir().glob("*.json"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > _KEPT_S:
                file.unlink()


class _RunFiles:
    """The state of the app's mirror, and the changes that it lacks."""

    def __init__(self, known: tuple[KnownFile, ...]) -> None:
        self._sent = {file.path: file for file in known}
        self._statuses: dict[str, Status] = {}
        self._changed_at: dict[str, int] = {}
        self._queue: tuple[str, ...] | None = None
        self._swept_at = -_SWEEP_S

    def changes(self) -> Iterator[FromBox]:
        """Yield the changes that the mirror lacks."""
        is_sweep = time.monotonic() - self._swept_at >= _SWEEP_S
        if is_sweep:
            self._swept_at = time.monotonic()
        runs = all_runs()
        here = {run.id for run in runs}
        for name in {path.partition("/")[0] for path in self._sent} - here:
            self._forget(name)
            yield Gone(name)
        for run in runs:
            with suppress(OSError):
                yield from self._changes_of(run, is_sweep=is_sweep)
        if (queue := tuple(waiting())) != self._queue:
            self._queue = queue
            yield Queue(queue)

    def _changes_of(self, run: RunDir, *, is_sweep: bool) -> Iterator[FromBox]:
        changed_at = run.path.stat().st_mtime_ns
        before = self._statuses.get(run.id)
        # An ended run changes only if a file in its folder is replaced.
        if (
            before
            and before.state not in ACTIVE
            and changed_at == self._changed_at.get(run.id)
            and not is_sweep
        ):
            return
        status = read_status(run)
        files, path = dict(_files_of(run)), f"{run.id}/status.json"
        # Deletions come first, because a folder may have taken the name of a file.
        for gone in [each for each in self._sent if each.startswith(f"{run.id}/") and each not in files]:
            if gone != path:
                del self._sent[gone]
                yield Gone(gone)
        for name, file in files.items():
            with suppress(OSError):
                yield from self._changes_of_file(name, file)
        # The status is sent last, when everything that it refers to has been sent.
        data = msgspec.json.encode(status)
        crc = zlib.crc32(data)
        known = self._sent.get(path)
        if known is None or (known.size, known.mtime_ns) != (len(data), crc):
            self._sent[path] = KnownFile(path, len(data), crc, 0)
            yield Piece(path, 0, data, crc, len(data))
        if before is None:
            yield Whole(run.id)
        self._statuses[run.id], self._changed_at[run.id] = status, changed_at

    def _changes_of_file(self, path: str, file: Path) -> Iterator[Piece]:
        status, known = file.stat(), self._sent.get(path)
        size, mtime_ns = status.st_size, status.st_mtime_ns
        if known is not None and (known.size, known.mtime_ns) == (size, mtime_ns):
            return
        if not grows(path):
            piece = read_piece(path, file, size, mtime_ns)
            self._sent[path] = KnownFile(path, piece.size, mtime_ns, 0)
            yield piece
            return
        continues = known is not None and size >= known.size and end_crc(file, known.size) == known.end_crc
        offset = known.size if known is not None and continues else 0
        with file.open("rb") as opened:
            opened.seek(offset)
            while offset < size or known is None or size < known.size:
                data = opened.read(min(_PIECE_BYTES, size - offset))
                end = offset + len(data)
                known = self._sent[path] = KnownFile(path, end, mtime_ns, end_crc(file, end))
                yield Piece(path, offset, data, mtime_ns, end)
                if not data:
                    break
                offset = end

    def _forget(self, name: str) -> None:
        self._sent = {path: file for path, file in self._sent.items() if path.partition("/")[0] != name}
        self._statuses.pop(name, None)


def _files_of(run: RunDir) -> Iterator[tuple[str, Path]]:
    """Yield each file of a run that is sent, after its path relative to the runs folder."""
    for folder, folders, names in os.walk(run.path):
        folders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            is_part = name in _UNSENT or name.startswith(".") or name.endswith("lock")
            if not is_part and file.is_file() and not file.is_symlink():
                yield f"{run.id}/{file.relative_to(run.path).as_posix()}", file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `store`."""
    parser.add_argument(
        "action",
        choices=("stream", "receive", "engine", "job"),
        help="send changes to runs, receive data files, or run an engine or a job of the app",
    )
    parser.add_argument("job", nargs="?", metavar="JOB", help="the job's function")


SUBCOMMANDS = {"store": Subcommand(run, add_arguments, for_programs=False)}
