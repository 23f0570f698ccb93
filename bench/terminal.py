"""A program on a pseudo-terminal: its output with times, its memory and its CPU time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import psutil

_CAN_YOU_HOLD_FRAMES = b"\x1b[?2026$p"
_YES = b"\x1b[?2026;2$y"
"""Reply that supports synchronized output, as newer terminals do: repaints are between two marks."""
_SILENCE_S = 0.02
"""Seconds of silence after which output is another repaint; not every program marks its own."""


class Terminal:
    """Starts ``command`` in a terminal of ``columns`` × ``rows``; ends it with the ``with`` block."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        columns: int = 80,
        rows: int = 24,
        env: Mapping[str, str] | None = None,
        controls: bool = False,
    ) -> None:
        """Start the program. With ``controls``, closing the terminal sends a signal to its whole session."""
        self.started = time.perf_counter()
        self._screen, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.program = subprocess.Popen(
            command,
            stdin=side,
            stdout=side,
            stderr=side,
            env={**os.environ, "TERM": "xterm-256color", **(env or {})},
            start_new_session=True,
            preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if controls else None,
        )
        os.close(side)
        self.painted = bytearray()
        self.repaints = 0
        self._read_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.program.kill()
        self.program.wait()
        self.hang_up()

    def hang_up(self) -> None:
        """Close the terminal, as a lost connection does."""
        if self._screen >= 0:
            os.close(self._screen)
        self._screen = -1

    def press(self, keys: str) -> None:
        """Send key presses."""
        os.write(self._screen, keys.encode())

    def read(self, seconds: float) -> bytes:
        """Return the output of the next ``seconds``, or of as long as anything arrives."""
        if not select.select([self._screen], [], [], max(0.0, seconds))[0]:
            return b""
        with contextlib.suppress(OSError):
            piece = os.read(self._screen, 1 << 16)
            now = time.perf_counter()
            self.repaints += now - self._read_at > _SILENCE_S
            self._read_at = now
            self.painted += piece
            if _CAN_YOU_HOLD_FRAMES in piece:
                os.write(self._screen, _YES)
            return piece
        return b""

    def wait_for(self, text: str, seconds: float = 60.0) -> float:
        """Return the seconds from the start until ``text`` has been painted. Raises TimeoutError."""
        deadline = time.perf_counter() + seconds
        while text.encode() not in self.painted:
            if time.perf_counter() > deadline:
                raise TimeoutError(f"{text!r} was not painted in {seconds} s")
            self.read(0.05)
        return time.perf_counter() - self.started

    def watch(self, seconds: float) -> int:
        """Read for ``seconds``; return the number of bytes painted."""
        before = len(self.painted)
        deadline = time.perf_counter() + seconds
        while (left := deadline - time.perf_counter()) > 0:
            self.read(min(left, 0.1))
        return len(self.painted) - before

    def answer_s(self, key: str, shows: str, seconds: float = 10.0) -> float | None:
        """Return the seconds from a key press until ``shows`` is painted; None if it never is."""
        before, pressed = len(self.painted), time.perf_counter()
        self.press(key)
        while time.perf_counter() < pressed + seconds:
            self.read(0.05)
            if self.painted.find(shows.encode(), before) >= 0:
                return self._read_at - pressed
        return None

    def memory_bytes(self) -> int:
        """Resident memory of the program."""
        return int(psutil.Process(self.program.pid).memory_info().rss)

    def cpu_s(self) -> float:
        """Processor time of the program so far."""
        times = psutil.Process(self.program.pid).cpu_times()
        return float(times.user + times.system)
