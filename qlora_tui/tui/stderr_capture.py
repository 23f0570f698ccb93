"""Redirects what libraries write to file descriptor 2, away from the screen.

A driver's warning or a library's progress bar would be painted across it. Textual paints to the same
descriptor, so it is given another one of the terminal, and 2 leads to the log.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NATIVE = 2


@contextmanager
def capture_stderr(log: Path) -> Iterator[None]:
    """Redirect within the ``with`` block, in which the app runs."""
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
    """Where to paint, given the descriptor of a terminal; closing it closes that."""
    return io.TextIOWrapper(io.BufferedWriter(_Terminal(terminal, "wb")), encoding="utf-8")


class _Terminal(io.FileIO):
    """A terminal stream that ignores writes once the terminal is closed.

    Textual's thread that writes would end by the error, and the app wait for ever for its queue to empty.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data).cast("B"))
