"""What a terminal shows after the bytes of a program, character by character with style, by pyte."""

from __future__ import annotations

import time
from weakref import WeakKeyDictionary

import pyte
from pyte import graphics
from pyte.screens import Char

from bench.terminal import Terminal

DEADLINE_S = 60.0
"""A guard against waiting for ever, not a budget."""
graphics.TEXT |= {2: "+blink"}
"""pyte has no dim text. It is stored as blinking text, which the app never sends."""


class TerminalScreen:
    """The screen of a terminal that received ``painted``."""

    def __init__(self, painted: bytes, columns: int = 80, rows: int = 24) -> None:
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self.feed(painted)

    def feed(self, painted: bytes) -> None:
        """Receive more."""
        self._stream.feed(painted)

    @property
    def text(self) -> str:
        """The lines of the screen."""
        return "\n".join(self._screen.display)

    def style_of(self, text: str) -> Char:
        """Attributes and colors at the start of the first occurrence of ``text``."""
        for cells in self._cells():
            line = "".join(cell.data or "\0" for cell in cells)
            if text in line:
                return cells[line.index(text)]
        return self._screen.default_char

    def _cells(self) -> list[list[Char]]:
        return [
            [self._screen.buffer[row][column] for column in range(self._screen.columns)]
            for row in range(self._screen.lines)
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TerminalScreen) and self._cells() == other._cells()


_Looks = dict[tuple[int, tuple[int, int]], tuple[TerminalScreen, int]]
_looks: WeakKeyDictionary[Terminal, _Looks] = WeakKeyDictionary()
"""Of each terminal, by the first byte of a screen and its size: the screen, and how much it has received."""


def screen_of(terminal: Terminal, since: int = 0, size: tuple[int, int] = (80, 24)) -> TerminalScreen:
    """The screen with all that was painted from byte ``since`` on."""
    looks = _looks.setdefault(terminal, {})
    screen, received = looks.get((since, size)) or (TerminalScreen(b"", *size), since)
    screen.feed(bytes(terminal.painted[received:]))
    looks[since, size] = screen, len(terminal.painted)
    return screen


def see(terminal: Terminal, *texts: str, since: int = 0, size: tuple[int, int] = (80, 24)) -> str:
    """Wait until ``texts`` are on the screen, as painted from byte ``since`` on; return its text."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        shown = screen_of(terminal, since, size).text
        missing = [text for text in texts if text not in shown]
        if not missing:
            return shown
        if time.monotonic() > deadline:
            raise AssertionError(f"not on the terminal: {missing}\n{shown}")
        terminal.read(0.2)
