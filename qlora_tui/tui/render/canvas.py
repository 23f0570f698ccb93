"""A canvas of character cells. Curves and marks are drawn on it with the dots of braille characters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from textual.content import Content

Look = Literal["line", "thin", "dotted", "points"]
"""How a curve is drawn. ``line``: a line of braille dots, two dots thick in a high graph and one dot in a low
graph. ``thin``: a line one dot thick. ``dotted``: a dim line with dots only in every other column of dots,
drawn over other lines; not drawn in a low graph. ``points``: dots for the lowest and the highest value at
each x, without a line.
"""
DOTS_WIDE, DOTS_HIGH = 2, 4
"""Width and height of a braille character in dots. Curves are drawn with these dots."""
_DASH = 2
"""Length of a dash, in cells. Lines that share cells are drawn as dashes of alternating colors."""
_BRAILLE_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The bit that each dot sets in the code point of a braille character: one tuple for each column of dots, in
order of rows from the top.
"""
_BRAILLE_BLANK = 0x2800
"""Code point of the braille character without dots."""


def _by_cell(dots: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Group the dots (x, y) by cell. Return, for the (column, row) of each cell, the bits of its dots in a
    braille character.
    """
    bits: dict[tuple[int, int], int] = {}
    for x, y in dots:
        cell = (x // DOTS_WIDE, y // DOTS_HIGH)
        bits[cell] = bits.get(cell, 0) | _BRAILLE_BITS[x % DOTS_WIDE][y % DOTS_HIGH]
    return bits


@dataclass
class Canvas:
    width: int
    height: int
    cells: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict)
    """(character, style) by (column, row)."""
    lines: dict[tuple[int, int], tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    """(dots, styles) by (column, row): the dots of all lines in the cell, as bits of a braille character, and
    the styles of these lines.
    """
    filled: dict[tuple[int, int], str] = field(default_factory=dict)
    """Background color by (column, row)."""

    def settle(self, dots: Iterable[tuple[int, int]], style: str, look: Look) -> None:
        """Draw a curve as braille characters. ``dots``: the (x, y) of each dot, counted from the top left.

        The dots of a line are added to the dots of other lines in the same cell. Points replace the contents
        of the cell. A dotted line, which is drawn last, has no dots in the cells of marks. In the cells that
        it shares with other lines, every other dash has its dots and its color.
        """
        for cell, bits in _by_cell(dots).items():
            if look == "dotted" and cell in self.lines:
                if not self.lines[cell][0] or cell[0] // _DASH % 2:
                    continue
                bits |= self.lines[cell][0]
            elif look != "points":
                before, styles = self.lines.get(cell, (0, ()))
                bits, _ = self.lines[cell] = before | bits, (style, *styles)
            self.cells[cell] = (chr(_BRAILLE_BLANK | bits), style)

    def set_symbol(self, cell: tuple[int, int], symbol: str, style: str) -> None:
        """Write one character into a cell (column, row), over everything else in the cell."""
        self.lines[cell] = 0, (style,)
        self.cells[cell] = (symbol, style)

    def color_shared_cells(self) -> None:
        """Color the cells that several lines share. If one of these lines has no cell of its own in the
        column, the shared cell gets the color of this line, so that the line remains visible. If several of
        the lines have no cell of their own, the colors of these lines alternate. If each line has one, the
        colors of all these lines alternate.
        """
        seen = {(column, *styles) for (column, _), (_, styles) in self.lines.items() if len(styles) == 1}
        for cell, (bits, styles) in self.lines.items():
            if len(styles) > 1 and self.cells[cell][0] == chr(_BRAILLE_BLANK | bits):
                column = cell[0]
                unseen = [style for style in styles if (column, style) not in seen] or styles
                self.cells[cell] = (self.cells[cell][0], unseen[column // _DASH % len(unseen)])

    def fill(self, dots: Iterable[tuple[int, int]], color: str) -> None:
        """Color the background of the cells below a line."""
        lowest: dict[int, int] = {}
        for x, y in dots:
            column, row = x // DOTS_WIDE, y // DOTS_HIGH
            lowest[column] = max(row, lowest.get(column, row))
        for column, touched in lowest.items():
            self.filled |= dict.fromkeys(((column, row) for row in range(touched + 1, self.height)), color)

    def line(self, row: int) -> Content:
        """Return the row with this number, counted from the top, as text."""
        return join_cells(self._cell((column, row)) for column in range(self.width))

    def _cell(self, place: tuple[int, int]) -> tuple[str, str]:
        text, style = self.cells.get(place, (" ", ""))
        color = self.filled.get(place)
        return (text, f"{style} on {color}".lstrip() if color else style)


def join_cells(cells: Iterable[tuple[str, str]]) -> Content:
    """Return a line of (character, style) cells. Adjacent cells of the same style share one span."""
    parts: list[tuple[str, str]] = []
    for text, style in cells:
        if parts and parts[-1][1] == style:
            parts[-1] = (parts[-1][0] + text, style)
        else:
            parts.append((text, style))
    return Content.assemble(*parts)
