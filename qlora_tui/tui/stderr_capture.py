"""What libraries write past Python to file descriptor 2, kept off the screen.

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
    """As long as the block lasts: the app is to be run in it."""
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
    """What is painted on a terminal that is gone is let go.

    Textual's thread that writes would end by the error, and the app wait for ever for its queue to empty.
    """

    def write(self, painted: Any, /) -> int:
        try:
            return super().write(painted)
        except OSError:
            return len(memoryview(painted).cast("B"))
