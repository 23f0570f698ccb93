"""The command line in a forked child, with bounds on time and memory, and what is wrong with how it ended."""

from __future__ import annotations

import os
import re
import resource
import selectors
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from qlora_tui.errors import INTERNAL_ERROR

TIME_S = 20.0
"""A command may take this long on a file of a few kilobytes, on a loaded machine."""
MEMORY_BYTES = 1 << 30
"""Largest resident set of an inspection, whatever the file."""
_OUTPUT_BYTES = 1 << 22
_RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Failure(Exception):
    """Something went wrong that must not: one sentence."""


@dataclass(frozen=True)
class Ended:
    """How a call of the program ended."""

    words: tuple[str, ...]
    code: int
    """Exit code; negative: the signal that ended it."""
    output: str
    """Standard output and error."""
    seconds: float
    peak_bytes: int
    timed_out: bool

    def check(self, *, codes: tuple[int, ...] = (0, 1, 2)) -> None:
        """Raise Failure for a crash, a traceback, a hang, raw control characters or too much memory."""
        called = f"`{' '.join(self.words)[:200]}`"
        if self.timed_out:
            raise Failure(f"{called} was still running after {self.seconds:.0f} s")
        if self.code < 0:
            raise Failure(f"{called} was ended by {signal.Signals(-self.code).name}")
        for sign in ("Traceback (most recent call last)", INTERNAL_ERROR, "This is a bug"):
            if sign in self.output:
                raise Failure(f"{called}: {self.output[-300:]!r}")
        if self.code not in codes:
            raise Failure(f"{called} ended with {self.code}: {self.output[-200:]!r}")
        if raw := _RAW.search(self.output):
            raise Failure(f"{called} wrote {self.output[max(0, raw.start() - 30) : raw.end() + 10]!r}")
        if self.peak_bytes > MEMORY_BYTES:
            raise Failure(f"{called} took {self.peak_bytes >> 20} MiB")


def call(*words: str, seconds: float = TIME_S) -> Ended:
    """Run ``qlora-tui`` with these words, its output not on a terminal."""
    read, write = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _become_program(words, write)
    os.close(write)
    output, timed_out = _read_all(read, started + seconds)
    if timed_out:
        os.killpg(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return Ended(
        words,
        os.waitstatus_to_exitcode(status),
        output.decode("utf-8", "replace"),
        time.monotonic() - started,
        usage.ru_maxrss * 1024,
        timed_out,
    )


def _become_program(words: tuple[str, ...], output: int) -> None:
    code = 70
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace")
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        # Beyond this a runaway would take the machine; the bound that counts is MEMORY_BYTES.
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        from qlora_tui.cli.main import main

        code = main(list(words))
        sys.stdout.flush()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _read_all(pipe: int, until: float) -> tuple[bytes, bool]:
    """What the child writes until it closes the pipe, and whether it was still writing at ``until``."""
    pieces: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        try:
            while True:
                left = until - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return b"".join(pieces), True
                piece = os.read(pipe, 1 << 16)
                if not piece:
                    return b"".join(pieces), False
                if sum(map(len, pieces)) < _OUTPUT_BYTES:
                    pieces.append(piece)
        finally:
            os.close(pipe)


def write(path: Path, content: bytes) -> Path:
    """Write a file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
