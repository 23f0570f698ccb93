"""Tables in lines of text: columns are declared once, and are cut or left out to fit a width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.cells import cell_len
from textual.content import Content

from qlora_tui.formatting import truncate_middle

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class Column(Generic[Row]):
    """One column of a table of ``Row``."""

    text: Callable[[Row], str | Content]
    """The text of a row: as a string in ``style``, as Content in its own."""
    title: str = ""
    width: int | None = None
    """In cells; None is as wide as its widest text, or as its title."""
    max_width: int | None = None
    """The most cells of a column as wide as its texts."""
    fills: bool = False
    """Whether it takes what the others leave of the line, ``width`` at least."""
    right: bool = False
    """Whether its texts are aligned at the right."""
    style: str = ""
    gap: int = 2
    """Spaces before it, unless it is the first."""
    shown_from: int = 0
    """Cells of the line from which it is shown."""


def table(columns: Sequence[Column[Row]], rows: Sequence[Row], width: int) -> list[Content]:
    """A line of titles, if there are any, and a line for each row, of ``width`` cells at most if that can be.

    Texts that are too long are cut in their middle, since names differ at their ends.
    """
    columns = [column for column in columns if width >= column.shown_from]
    texts = [[column.text(row) for row in rows] for column in columns]
    widths = [_width(column, cells) for column, cells in zip(columns, texts, strict=True)]
    gaps = [column.gap if number else 0 for number, column in enumerate(columns)]
    for number, column in enumerate(columns):
        if column.fills:
            others = sum(widths) - widths[number] + sum(gaps)
            widths[number] = max(column.width or 1, width - others)
    lines = []
    if any(column.title for column in columns):
        titles: list[str | Content] = [column.title for column in columns]
        lines.append(Content("").join(_cells(columns, titles, widths, gaps)).rstrip().stylize("dim"))
    for number in range(len(rows)):
        lines.append(Content("").join(_cells(columns, [cells[number] for cells in texts], widths, gaps)))
    return lines


def fit_cells(text: Content, width: int) -> Content:
    """Cut a text in its middle to ``width`` cells; one with wide characters or several styles at its end."""
    if text.cell_length <= width:
        return text
    if len(text.spans) <= 1 and text.cell_length == len(text):
        return Content.styled(truncate_middle(text.plain, width), text.spans[0].style if text.spans else "")
    return text.truncate(width, ellipsis=True)


def _width(column: Column[Row], texts: Sequence[str | Content]) -> int:
    if column.width is not None:
        return column.width
    widest = max(cell_len(t) if isinstance(t, str) else t.cell_length for t in (column.title, *texts))
    return widest if column.max_width is None else min(widest, column.max_width)


def _cells(
    columns: Sequence[Column[Row]], texts: Sequence[str | Content], widths: Sequence[int], gaps: Sequence[int]
) -> list[Content]:
    cells = []
    for column, text, width, gap in zip(columns, texts, widths, gaps, strict=True):
        cell = fit_cells(Content.styled(text, column.style) if isinstance(text, str) else text, width)
        missing = width - cell.cell_length
        cells.append(cell.pad_left(gap + missing) if column.right else cell.pad_right(missing).pad_left(gap))
    return cells
