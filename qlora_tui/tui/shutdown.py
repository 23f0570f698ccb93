"""Shutdown from outside: a closed terminal, or a signal.

A terminal may go without SIGHUP (the app has it ignored, or is not the one the terminal controls). Textual
then reads the end of its input as often as a core can, for ever.
"""

from __future__ import annotations

import asyncio
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

_BY_SIGNAL = 128
"""Added to its number: the exit code of what a signal ended, as shells have it."""


def install_shutdown_handlers(leave: Callable[[int], object]) -> None:
    """Call ``leave`` with an exit code, once, when the terminal is closed or on SIGHUP or SIGTERM."""
    _on_terminal_lost(lambda: leave(_BY_SIGNAL + signal.SIGHUP))
    for number in (signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            _on_signal(number, leave)


def _on_terminal_lost(leave: Callable[[], object]) -> None:
    gone = select.epoll()
    for stream in (sys.__stdin__, sys.__stderr__):
        if stream is not None:
            # A file is always there, and is nothing to wait for.
            with suppress(PermissionError):
                gone.register(stream.fileno(), 0)  # No events requested: a hang-up is always reported.

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
