"""Stdout and stderr of commands: a terminal receives only control sequences of this program."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from qlora_tui.visible import visible


class VisibleStream:
    """Text stream that shows unsafe characters as symbols; everything else goes to the wrapped stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""
        """Text written last, if the next piece may continue it: an emoji can arrive in pieces."""

    def write(self, text: str) -> int:
        """Write ``text`` with unsafe characters made visible."""
        safe = visible(self._last + text)[len(self._last) :]
        last = text[-1:]
        self._last = "" if last.isascii() or visible(last) != last else last
        self._stream.write(_encodable(safe, self._stream))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each line with unsafe characters made visible."""
        for line in lines:
            self.write(line)

    def write_control(self, sequence: str) -> None:
        """Write one of this program's own control sequences."""
        self._stream.write(sequence)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_missing_streams() -> None:
    """Connect closed standard streams to ``/dev/null``, or the next file opened would take their place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 (for the whole process)


@contextmanager
def visible_output() -> Iterator[None]:
    """Show unsafe characters as symbols on stdout and stderr within the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = VisibleStream(sys.stdout), VisibleStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def write_control(stream: TextIO, sequence: str) -> None:
    """Write one of this program's own control sequences to stdout or stderr."""
    (stream.write_control if isinstance(stream, VisibleStream) else stream.write)(sequence)


def show_in_place(text: str) -> None:
    """Show text on stderr in place of the line before; nothing where stderr is not a terminal.

    The text must not be shorter than the one before it.
    """
    if sys.stderr.isatty():
        write_control(sys.stderr, "\r")
        print(text, end="", file=sys.stderr, flush=True)


def _encodable(text: str, stream: TextIO) -> str:
    # A symbol that the terminal's encoding lacks, as in the C locale, must not end the program.
    if text.isascii():
        return text
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
