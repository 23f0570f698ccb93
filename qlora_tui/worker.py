"""Jobs in separate processes: ``python -m qlora_tui.worker MODULE:FUNCTION``.

A job is a plain function of this package with annotated arguments, named by its import path. The arguments
arrive as one line of JSON on stdin. A job with a parameter ``report`` may report its progress. Each line on
stdout is a :data:`Message`: any number of :class:`Progress`, then a :class:`Result` or a :class:`Failure`.
Output of libraries goes to stderr.

:func:`run_job` starts a job, waits for its end, and kills it if interrupted. The job also ends with the
process that started it, however that process ends, because its stdin closes. A job of :func:`start_detached`
outlives that process. Other programs, such as the trainer, are started with :func:`module_argv`.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from qlora_tui.decoding import try_json
from qlora_tui.errors import UserError
from qlora_tui.process_end import ended_early

PYTHONPATH = "PYTHONPATH"
_PACKAGE = str(Path(__file__).parents[1])


def module_argv(module: str, *arguments: str) -> list[str]:
    """Return the command that runs ``module`` in this Python.

    ``-P`` prevents the import of modules from the current folder, such as a ``torch.py``.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def subprocess_env() -> dict[str, str]:
    """Return the environment of this process, with variables that let a child find this package and print
    without buffering.
    """
    paths = dict.fromkeys((_PACKAGE, *filter(None, os.environ.get(PYTHONPATH, "").split(os.pathsep))))
    return {**os.environ, PYTHONPATH: os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def user_env() -> dict[str, str]:
    """Return an environment for the user's own programs, without the variables of :func:`subprocess_env`."""
    return {name: value for name, value in os.environ.items() if name not in (PYTHONPATH, "PYTHONUNBUFFERED")}


PROGRESS_INTERVAL_S = 0.2
"""Minimum time between messages that differ only in numbers, and maximum wait for a message before
``should_stop`` is called again, in seconds.
"""
PROGRAM = "qlora_tui.worker"
DETACHED = "--detached"
"""Flag of a job that continues when its stdin closes."""
_LAST_BYTES = 65_536
_EXIT_S = 5.0
"""Seconds within which a job must exit once its output has ended. After that, it is killed."""

T = TypeVar("T")


class Progress(Struct, frozen=True, tag="progress", omit_defaults=True):
    """Progress of a job."""

    done: int = 0
    total: int = 0
    """Total amount of work in the unit of the job, such as bytes, rows or passes over samples."""
    text: str = ""
    """Current activity: a file name or a sentence."""


class Result(Struct, frozen=True, tag="result"):
    """The result of the function."""

    value: msgspec.Raw

    def decode(self, kind: type[T]) -> T:
        """Return the value, decoded as ``kind``."""
        return _decode(self.value, kind)


class Failure(Struct, frozen=True, tag="failure", omit_defaults=True):
    """The job ended with a UserError, whose fields this message has."""

    title: str
    what: str
    why: str = ""
    fix: str = ""
    code: str = ""
    exit_code: int = 1

    def error(self) -> UserError:
        """Return the exception."""
        return UserError.of(self)


Message: TypeAlias = Progress | Result | Failure
_DECODER: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


class Report(Protocol):
    """Function that a job calls to report its progress."""

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Send a :class:`Progress`."""


class JobStopped(Exception):
    """A job ended because ``should_stop`` returned true."""


def run_job(
    job: str,
    *arguments: object,
    result: type[T],
    title: str,
    subject: str,
    fix: str = "Try again.",
    on_progress: Callable[[Progress], object] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    deadline_s: float | None = None,
    shows_stderr: bool = False,
    environ: Mapping[str, str] | None = None,
) -> T:
    """Run a job to its end in a separate process, and return its result.

    Args:
        job: The function, as ``qlora_tui.module:function``.
        arguments: Its arguments: paths, or values that JSON can represent.
        result: Type of the function's result.
        title: Title of the error if the process ends without a result or takes too long.
        subject: Name of the process in this error, such as ``The process that converted x.gguf``.
        fix: What the user can do about this error, unless memory ran out.
        on_progress: Called with each progress message. An exception that it raises ends the job.
        should_stop: Called several times per second, even while the job is silent.
        deadline_s: Seconds after which the job is killed; None for no limit.
        shows_stderr: Whether the job uses this process's stderr, for progress bars of a library.
        environ: Environment of the job; by default, :func:`subprocess_env`.

    Raises:
        JobStopped: ``should_stop`` returned true.
        UserError: The job raised it, died, or took too long.
    """
    outcome: Message | None = None
    with (
        error_file() as errors,
        _start(job, arguments, None if shows_stderr else errors, environ) as child,
    ):
        assert child.stdout is not None
        try:
            for message in _messages(child.stdout, should_stop, deadline_s):
                if isinstance(message, Progress):
                    on_progress(message)
                else:
                    outcome = message
            try:
                code = child.wait(_EXIT_S)
            except subprocess.TimeoutExpired:
                # The job has reported how it ended, but a library's thread keeps the process alive.
                code = 0
        except TimeoutError:
            what = f"{subject} did not end within {deadline_s:,.0f} seconds."
            raise UserError(title, what=what, fix=fix) from None
        finally:
            # Whatever interrupts the wait, the child must not outlive it.
            child.kill()
        last_line = last_lines(errors, 1)
    if isinstance(outcome, Failure):
        raise outcome.error()
    if code or not isinstance(outcome, Result):
        raise ended_early(title, subject, code, last_words=last_line, fix=fix)
    return outcome.decode(result)


def start_detached(
    job: str,
    *arguments: object,
    stdout: int | IO[bytes],
    stderr: int | IO[bytes] | None,
    environ: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a job that outlives this process and its terminal."""
    child = _start(job, arguments, stderr, environ, stdout=stdout, detached=True)
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.close()
    child.stdin = None
    return child


def decode_message(line: bytes) -> Message | None:
    """Decode one line of a job's stdout; return None if it is not a message."""
    return try_json(line, _DECODER)


def _start(
    job: str,
    arguments: tuple[object, ...],
    stderr: int | IO[bytes] | None,
    environ: Mapping[str, str] | None = None,
    *,
    stdout: int | IO[bytes] = subprocess.PIPE,
    detached: bool = False,
) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        module_argv(PROGRAM, job, *((DETACHED,) if detached else ())),
        env=dict(environ) if environ is not None else subprocess_env(),
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        # Ctrl-C in a terminal is meant for this process, which then ends the job.
        start_new_session=True,
    )
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        plain = msgspec.to_builtins(arguments, enc_hook=_encode_path)
        child.stdin.write(json.dumps(plain).encode() + b"\n")
        child.stdin.flush()
    return child


def _messages(
    output: IO[bytes], should_stop: Callable[[], bool], deadline_s: float | None
) -> Iterator[Message]:
    """Yield messages until the output ends. Raises JobStopped and TimeoutError."""
    ends_at = None if deadline_s is None else time.monotonic() + deadline_s
    partial_line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            if should_stop():
                raise JobStopped
            if ends_at is not None and time.monotonic() > ends_at:
                raise TimeoutError
            if not selector.select(PROGRESS_INTERVAL_S):
                continue
            piece = output.read1(65_536)  # type: ignore[attr-defined]  # a pipe is a BufferedReader
            if not piece:
                return
            *lines, partial_line = (partial_line + piece).split(b"\n")
            yield from filter(None, map(decode_message, lines))


def error_file() -> IO[bytes]:
    """Create a file in memory for the errors of a child, because a full disk has no room for it."""
    return os.fdopen(os.memfd_create("errors"), "w+b")


def last_lines(errors: IO[bytes], count: int) -> str:
    """Return the last ``count`` lines of a child's error file, joined into one line."""
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - _LAST_BYTES))
    return " ".join(errors.read().decode(errors="replace").strip().splitlines()[-count:])


def _encode_path(value: object) -> bytes:
    if isinstance(value, Path):
        return os.fsencode(value)  # a name need not be UTF-8
    raise NotImplementedError(type(value))


def _decode(value: msgspec.Raw, kind: type[T]) -> T:
    return msgspec.json.decode(value, type=kind, dec_hook=_decode_path)


def _decode_path(kind: type, value: str) -> Path:
    assert kind is Path
    return Path(os.fsdecode(base64.b64decode(value)))


class _Messages:
    """The worker's side of stdout, which is also the ``report`` of its job."""

    def __init__(self, output: IO[bytes]) -> None:
        self._output: IO[bytes] | None = output
        self._sent = Progress()
        self._sent_at = -PROGRESS_INTERVAL_S

    def __call__(self, done: int, total: int, text: str = "") -> None:
        progress, now = Progress(done, total, text), time.monotonic()
        if progress.text != self._sent.text or done == total or now - self._sent_at >= PROGRESS_INTERVAL_S:
            self._sent, self._sent_at = progress, now
            self.send(progress)

    def send(self, message: Message) -> None:
        """Write a message unless the reader has gone. A detached job continues without it."""
        if self._output is not None:
            try:
                self._output.write(msgspec.json.encode(message) + b"\n")
                self._output.flush()
            except BrokenPipeError:
                self._output = None


def main(job: str, *flags: str) -> int:
    """Run the job with the arguments from stdin; return the exit code."""
    messages = _Messages(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    arguments = sys.stdin.buffer.readline()
    if DETACHED not in flags:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        value = _call(job, arguments, messages)
    except UserError as error:
        messages.send(Failure(**error.fields()))
        if DETACHED in flags:
            print(error, file=sys.stderr)  # for a log, because nobody may be reading the messages
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    messages.send(Result(msgspec.Raw(msgspec.json.encode(value, enc_hook=_encode_path))))
    return 0


def _end_with_stdin() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def _call(job: str, encoded: bytes, report: Report) -> Any:
    import inspect  # only a worker needs it

    module, _, name = job.partition(":")
    function = getattr(importlib.import_module(module), name)
    parameters = list(inspect.signature(function).parameters)
    hints = typing.get_type_hints(function)
    typed = [hints[parameter] for parameter in parameters if parameter != "report"]
    # Use Python's json, because configs of models contain infinite numbers, which msgspec converts to null.
    given = json.loads(encoded)
    arguments = [
        msgspec.convert(value, kind, dec_hook=_decode_path) for value, kind in zip(given, typed, strict=False)
    ]
    return function(*arguments, **({"report": report} if "report" in parameters else {}))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
