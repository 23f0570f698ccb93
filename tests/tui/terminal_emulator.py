"""A terminal's screen: what stands on it after the bytes of a program, character by character with style."""

from __future__ import annotations

import re
import time

from rich.cells import cell_len

from bench.terminal import Terminal

DEADLINE_S = 60.0
"""A guard against waiting for ever, not a budget."""
_TOKEN = re.compile(
    r"\x1b\[(?P<args>[0-?]*)[ -/]*(?P<final>[@-~])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1bP.*?\x1b\\|\x1b."
    r"|(?P<text>[^\x1b])",
    re.DOTALL,
)


class Glass:
    """Takes moves, styles and text, all that Textual sends; everything else is passed over."""

    def __init__(self, columns: int, rows: int) -> None:
        self._cells = [[(" ", "")] * columns for _ in range(rows)]

    def shown(self, painted: bytes) -> Glass:
        """After these bytes."""
        x = y = 0
        style = ""
        for token in _TOKEN.finditer(painted.decode("utf-8", "ignore")):
            if token["final"] == "H":
                y, x = (int(part) - 1 for part in token["args"].split(";"))
            elif token["final"] == "m":
                style = "" if token["args"] in ("", "0") else token["args"]
            elif token["text"] == "\n":
                x, y = 0, y + 1
            elif token["text"] and token["text"].isprintable():
                for place, part in enumerate(token["text"].ljust(cell_len(token["text"]), "\0")):
                    if y < len(self._cells) and x + place < len(self._cells[y]):
                        self._cells[y][x + place] = (part, style)
                x += cell_len(token["text"])
        return self

    @property
    def text(self) -> str:
        """Its lines."""
        return "\n".join("".join(text for text, _ in line) for line in self._cells)

    def style_of(self, text: str) -> set[str]:
        """Attributes and colours, as SGR has them, that ``text`` begins with where it first stands."""
        for line, cells in zip(self.text.splitlines(), self._cells, strict=True):
            if text in line:
                return set(cells[line.index(text)][1].split(";"))
        return set()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Glass) and self._cells == other._cells


def see(terminal: Terminal, *texts: str, since: int = 0, size: tuple[int, int] = (80, 24)) -> str:
    """Wait until these are on the screen, as painted from byte ``since`` on; its text."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        shown = Glass(*size).shown(bytes(terminal.painted[since:])).text
        missing = [text for text in texts if text not in shown]
        if not missing:
            return shown
        if time.monotonic() > deadline:
            raise AssertionError(f"not on the terminal: {missing}\n{shown}")
        terminal.read(0.2)
