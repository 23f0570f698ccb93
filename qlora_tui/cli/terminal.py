"""Stdout and stderr of a verb: a terminal obeys only what this program itself sends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from qlora_tui.visible import visible


class VisibleStream:
    """A text stream that shows unsafe characters as symbols; everything else is the stream's it writes to."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""
        """What was written last, where the next piece may go on with it: an emoji can come in pieces."""

    def write(self, text: str) -> int:
        """Write ``text``, made visible."""
        safe = visible(self._last + text)[len(self._last) :]
        last = text[-1:]
        self._last = "" if last.isascii() or visible(last) != last else last
        self._stream.write(_encodable(safe, self._stream))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def write_control(self, sequence: str) -> None:
        """Write a control sequence of this program's own."""
        self._stream.write(sequence)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def visible_output() -> Iterator[None]:
    """Show unsafe characters as symbols on stdout and stderr as long as the block lasts."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = VisibleStream(sys.stdout), VisibleStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def write_control(stream: TextIO, sequence: str) -> None:
    """Write a control sequence of this program's own to stdout or stderr."""
    (stream.write_control if isinstance(stream, VisibleStream) else stream.write)(sequence)


def _encodable(text: str, stream: TextIO) -> str:
    # In the C locale and in a terminal of another encoding a symbol must not end the program.
    if text.isascii():
        return text
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
