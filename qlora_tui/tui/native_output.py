"""What libraries write past Python to file descriptor 2, kept off the screen.

A driver's warning or a library's progress bar would be painted across it. Textual paints to the same
descriptor, so it is given another one of the terminal, and 2 leads to the log.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NATIVE = 2


@contextmanager
def native_errors_in(log: Path) -> Iterator[None]:
    """As long as the block lasts: the app is to be run in it."""
    before = sys.__stderr__
    terminal = os.dup(_NATIVE)
    with log.open("ab") as file, os.fdopen(os.dup(terminal), "w", encoding="utf-8") as screen:
        os.dup2(file.fileno(), _NATIVE)
        sys.__stderr__ = screen  # type: ignore[misc]
        try:
            yield
        finally:
            sys.stderr.flush()
            sys.__stderr__ = before  # type: ignore[misc]
            os.dup2(terminal, _NATIVE)
            os.close(terminal)
