"""The key figures of a screen: in one line, or in large digits that are three rows high."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

from textual.content import Content

_GAP = 3
"""Gap between two figures, in cells."""
_DIGITS = {
    "0": ("███", "█ █", "█ █", "█ █", "███"),
    "1": ("██ ", " █ ", " █ ", " █ ", "███"),
    "2": ("███", "  █", "███", "█  ", "███"),
    "3": ("███", "  █", "███", "  █", "███"),
    "4": ("█ █", "█ █", "███", "  █", "  █"),
    "5": ("███", "█  ", "███", "  █", "███"),
    "6": ("███", "█  ", "███", "█ █", "███"),
    "7": ("███", "  █", "  █", "  █", "  █"),
    "8": ("███", "█ █", "███", "█ █", "███"),
    "9": ("███", "█ █", "███", "  █", "███"),
    ".": (" ", " ", " ", " ", "█"),
    ",": (" ", " ", " ", "█", "█"),
    ":": (" ", "█", " ", "█", " "),
    "-": ("  ", "  ", "██", "  ", "  "),
}
"""Five rows of dots for each character that can be drawn in large digits."""
_HALVES = {(" ", " "): " ", ("█", " "): "▀", (" ", "█"): "▄", ("█", "█"): "█"}
_PART = re.compile(r"([\d.,:-]+)|([^\d.,:-]+)")


@dataclass(frozen=True)
class Figure:
    """A value with its units, such as ``3 h 12 min``, and a label."""

    label: str
    value: str
    style: str = "bold"
    label_first: bool = True
    """Whether the label is before the value, as in ``loss 2.56``, or after it, as in ``3 min left``."""


def figure_line(figures: Iterable[Figure]) -> Content:
    """Return figures in one line, such as ``smoothed loss 2.56   3 min left``, with bright values and dim
    labels.
    """
    lines = []
    for figure in figures:
        parts = [(figure.label, "dim"), (figure.value, figure.style)]
        lines.append(
            Content(" ").join(Content.styled(*part) for part in parts[:: 1 if figure.label_first else -1])
        )
    return Content(" " * _GAP).join(lines)


def fact(label: str, value: str, unit: str = "") -> Content:
    """Return a value between a dim label and a dim unit, such as ``epoch 0.83 of 2`` or ``13 min in steps``.
    An empty label or unit is left out.
    """
    parts = (Content.styled(label, "dim"), Content(value), Content.styled(unit, "dim"))
    return Content(" ").join(filter(None, parts))


def large_figures(figures: Iterable[Figure]) -> list[Content]:
    """Return the figures side by side in three lines. Numbers are in digits that are three lines high. Units
    and labels are in the last line.
    """
    columns = [_large(figure) for figure in figures]
    gap = Content(" " * _GAP)
    return [gap.join(rows) for rows in zip(*columns, strict=True)]


def _large(figure: Figure) -> list[Content]:
    """Return a figure as three lines of equal width."""
    rows = ["", "", ""]
    for number, unit in _PART.findall(figure.value):
        if number:
            drawn = [_digit(character) for character in number]
            rows = [
                f"{row}{' ' if row else ''}{' '.join(cells)}"
                for row, cells in zip(rows, zip(*drawn, strict=True), strict=True)
            ]
        else:
            rows = [*(row + " " * (len(unit.strip()) + 1) for row in rows[:2]), f"{rows[2]} {unit.strip()}"]
    lines = [
        Content.styled(rows[0], figure.style),
        Content.styled(rows[1], figure.style),
        Content.assemble((rows[2], figure.style), (f" {figure.label}", "dim")),
    ]
    return [line.pad_right(lines[2].cell_length - line.cell_length) for line in lines]


def _digit(character: str) -> tuple[str, ...]:
    """Return the large form of a character as three rows of cells, each cell two dots high."""
    dots = _DIGITS[character]
    pairs = zip_longest(dots[::2], dots[1::2], fillvalue=" " * len(dots[0]))
    return tuple("".join(_HALVES[pair] for pair in zip(*rows, strict=True)) for rows in pairs)
