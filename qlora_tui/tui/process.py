"""The app's process: garbage collection, shutdown, standard error, and full disks."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from textual.app import App
from textual.worker import WorkerFailed

from qlora_tui.errors import UserError, disk_problem

_is_tuned = False


def enable_gc() -> None:
    """Enable garbage collection, which is disabled at startup until the first frame has been sent."""
    global _is_tuned
    if not gc.isenabled():
        _is_tuned = True
        gc.enable()
        gc.freeze()


def freeze_objects() -> None:
    """Collect garbage, then exempt all current objects from garbage collection, because scanning them would
    delay key presses. Do nothing if :func:`enable_gc` has not been called.
    """
    if _is_tuned:
        gc.collect()
        gc.freeze()


_BY_SIGNAL = 128
"""Offset of exit codes. As in shells, the exit code of a process ended by a signal is 128 plus the signal's
number.
"""


def install_shutdown_handlers(leave: Callable[[int], object]) -> None:
    """Call ``leave`` with an exit code when the terminal is closed or the process receives SIGHUP or
    SIGTERM.
    """
    _on_terminal_lost(lambda: leave(_BY_SIGNAL + signal.SIGHUP))
    for number in (signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            _on_signal(number, leave)


def _on_terminal_lost(leave: Callable[[], object]) -> None:
    gone = select.epoll()
    for stream in (sys.__stdin__, sys.__stderr__):
        if stream is not None:
            # epoll does not accept regular files. They need not be watched, because only terminals can hang
            # up.
            with suppress(PermissionError):
                gone.register(stream.fileno(), 0)  # no event mask, because poll() always reports a hang-up

    def is_gone() -> None:
        loop.remove_reader(gone.fileno())
        gone.close()
        leave()

    loop = asyncio.get_running_loop()
    loop.add_reader(gone.fileno(), is_gone)


def _on_signal(number: signal.Signals, leave: Callable[[int], object]) -> None:
    loop = asyncio.get_running_loop()

    def handler(_number: int, _frame: FrameType | None) -> None:
        # A second signal ends the app at once.
        signal.signal(number, signal.SIG_DFL)
        loop.call_soon_threadsafe(leave, _BY_SIGNAL + number)

    signal.signal(number, handler)


class AppThreads(ThreadPoolExecutor):
    """Runs ``asyncio.to_thread`` calls in threads. When the event loop closes, it does not wait for these
    threads.
    """

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)


_NATIVE = 2


@contextmanager
def capture_stderr(log: Path) -> Iterator[None]:
    """Append standard error to ``log`` while the context is active. Textual paints to the terminal through
    ``sys.__stderr__``, so this attribute is replaced by a stream to the terminal.
    """
    before = sys.__stderr__
    terminal = os.dup(_NATIVE)
    with log.open("ab") as file, screen_on(os.dup(terminal)) as screen:
        os.dup2(file.fileno(), _NATIVE)
        sys.__stderr__ = screen  # type: ignore[misc]
        try:
            yield
        finally:
            sys.stderr.flush()
            sys.__stderr__ = before  # type: ignore[misc]
            os.dup2(terminal, _NATIVE)
            os.close(terminal)


def screen_on(terminal: int) -> io.TextIOWrapper:
    """Return a stream for painting to the terminal with this file descriptor.

    Closing the stream closes the descriptor.
    """
    return io.TextIOWrapper(io.BufferedWriter(_Terminal(terminal, "wb")), encoding="utf-8")


class _Terminal(io.FileIO):
    """A terminal stream that ignores writes once the terminal is closed.

    If a write raised an error, Textual's writer thread would end, and the app would wait forever for the
    thread's queue to empty.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data).cast("B"))


REPEAT_S = 30.0
"""Minimum number of seconds between two reports of the same problem. Without this limit, an action that runs
every second would report its problem every second.
"""


class DiskFaults:
    """Reports disk errors, such as a full disk. Other errors are left to the caller."""

    def __init__(self) -> None:
        self._reported_at: dict[str, float] = {}
        self.ended_by: UserError | None = None
        """The disk error that ended the app; None if no disk error did. Textual stops a message pump whose
        handler raises an exception, so the app cannot continue.
        """

    def handle(self, app: App[Any], error: Exception) -> bool:
        """Report a disk error; return False for any other error.

        A disk error in a worker becomes a notification. A disk error in a message handler ends the app.
        """
        if isinstance(error, WorkerFailed):
            return self.notify(app, error.error)
        problem = disk_problem(error) if isinstance(error, OSError) else None
        if problem is not None:
            self.ended_by = problem
            app.exit(return_code=problem.exit_code)
        return problem is not None

    def notify(self, app: App[Any], error: BaseException) -> bool:
        """Notify the user of a disk error, at most every ``REPEAT_S`` seconds for each problem. Return False
        for any other error.
        """
        problem = disk_problem(error) if isinstance(error, OSError) else None
        if problem is None:
            return False
        if time.monotonic() - self._reported_at.get(problem.code, -REPEAT_S) >= REPEAT_S:
            self._reported_at[problem.code] = time.monotonic()
            app.notify(str(problem), severity="error")
        return True
