"""A canvas of cells that curves, marks and labels are drawn on, with the dots of braille characters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from textual.content import Content

Look = Literal["line", "thin", "dotted", "points"]
"""How a curve is drawn. ``line``: a line of braille dots, two dots thick. ``thin``: a line of single dots.
``dotted``: a dot in every other column of dots, behind all other lines. ``points``: a dot for each value,
without a line.
"""
DOTS_WIDE, DOTS_HIGH = 2, 4
"""Width and height of a braille character in dots. Points are drawn with these dots."""
_DASH = 2
"""Length of a dash, in cells. Lines that share cells are drawn as dashes of alternating colors."""
_BRAILLE_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bit of each dot of a braille character in its code point, by the dot's column, then by its row from the
top.
"""
_BRAILLE_BLANK = 0x2800
"""Code point of the braille character without dots."""


_LABEL_PLACES = sorted(
    product(range(-3, 4), range(1, 6), (False, True)),
    key=lambda place: (abs(place[0]) * 2 + place[1], place[0] != 0, place[2]),
)
"""Places of a label relative to its mark, as (columns to the right, distance in rows, whether the label is
below), the preferred place first.
"""


def _by_cell(dots: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Return the dots (x, y) as bits of a braille character by (column, row) of their cells."""
    bits: dict[tuple[int, int], int] = {}
    for x, y in dots:
        cell = (x // DOTS_WIDE, y // DOTS_HIGH)
        bits[cell] = bits.get(cell, 0) | _BRAILLE_BITS[x % DOTS_WIDE][y % DOTS_HIGH]
    return bits


def _touches(some: int, others: int) -> bool:
    """Return whether dots of a cell are in the same or in adjacent rows as other dots of the cell. Both are
    given as bits of a braille character.
    """
    rows, other_rows = (
        [row for row in range(DOTS_HIGH) if bits & (_BRAILLE_BITS[0][row] | _BRAILLE_BITS[1][row])]
        for bits in (some, others)
    )
    return any(abs(row - other) <= 1 for row in rows for other in other_rows)


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
    marked: set[tuple[int, int]] = field(default_factory=set)
    """Cells with marks, by (column, row)."""
    filled: dict[tuple[int, int], str] = field(default_factory=dict)
    """Background color by (column, row)."""

    def settle(self, dots: Iterable[tuple[int, int]], style: str, look: Look) -> None:
        """Draw the dots (x, y) of a curve, counted from the top left, as braille characters. The dots of a
        line are added to the dots of other lines in the same cell. Points replace the contents of the cell.
        """
        for cell, bits in _by_cell(dots).items():
            color = style
            if look == "dotted" and cell in self.lines:
                before, styles = self.lines[cell]
                if cell in self.marked or _touches(before, bits):
                    continue
                bits, color = before | bits, self.cells[cell][1]
                self.lines[cell] = bits, styles
            elif look != "points":
                before, styles = self.lines.get(cell, (0, ()))
                bits, _ = self.lines[cell] = before | bits, (style, *styles)
            self.cells[cell] = (chr(_BRAILLE_BLANK | bits), color)

    def set_mark(self, dots: Iterable[tuple[int, int]], style: str) -> None:
        """Draw the dots of a mark, in addition to the dots of the lines in the same cells."""
        for cell, bits in _by_cell(dots).items():
            bits |= self.lines.get(cell, (0, ()))[0]
            self.lines[cell] = bits, (style,)
            self.marked.add(cell)
            self.cells[cell] = (chr(_BRAILLE_BLANK | bits), style)

    def set_label(self, column: int, rows: range, text: str, style: str) -> None:
        """Write a label into the cell above a mark in the given rows of a column, or into another cell close
        to the mark if lines are in that cell. The label is left out if there is no such cell.
        """
        for right, away, is_below in _LABEL_PLACES:
            cell = (column + right, rows[-1] + away if is_below else rows[0] - away)
            if 0 <= cell[0] < self.width and 0 <= cell[1] < self.height and cell not in self.lines:
                self.lines[cell] = 0, (style,)
                self.cells[cell] = (text, style)
                return

    def color_shared_cells(self) -> None:
        """Color the cells that several lines share. A line that has no cell of its own in the column gets the
        color of the shared cells there, so that it remains visible. If there are several such lines, or none,
        the colors alternate.
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
