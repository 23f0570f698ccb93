"""Tables in lines of text: columns are declared once, and are cut or left out to fit a width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.cells import cell_len
from textual.content import Content, Span

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class Column(Generic[Row]):
    """One column of a table of ``Row``."""

    text: Callable[[Row], str | Content]
    """The text of a row: as a string in ``style``, as Content in its own."""
    title: str = ""
    width: int | None = None
    """In cells; None is as wide as its widest text, or as its title."""
    min_width: int = 1
    max_width: int | None = None
    """The most cells of a column as wide as its texts."""
    shrinks: bool = False
    """Whether it gives up cells, down to ``min_width``, where the columns are too wide together."""
    fills: bool = False
    """Whether it takes all that the others leave of the line, ``min_width`` at least."""
    right: bool = False
    """Whether its texts are aligned at the right."""
    style: str = ""
    gap: int = 2
    """Spaces before it, unless it is the first."""
    shown_from: int = 0
    """Cells of the line from which it is shown."""


def table(
    columns: Sequence[Column[Row]], rows: Sequence[Row], width: int, title_style: str = "dim"
) -> list[Content]:
    """A line of titles, if there are any, and a line for each row, of ``width`` cells at most if that can be.

    Texts that are too long are cut in their middle, since names differ at their ends.
    """
    columns = [column for column in columns if width >= column.shown_from]
    texts = [[column.text(row) for row in rows] for column in columns]
    widths = [_width(column, cells) for column, cells in zip(columns, texts, strict=True)]
    gaps = [column.gap if number else 0 for number, column in enumerate(columns)]
    for number, column in enumerate(columns):
        left = width - sum(gaps) - sum(widths) + widths[number]
        if column.fills or (column.shrinks and left < widths[number]):
            widths[number] = max(column.min_width, left)
    lines = []
    if any(column.title for column in columns):
        titles: list[str | Content] = [column.title for column in columns]
        lines.append(Content("").join(_cells(columns, titles, widths, gaps)).rstrip().stylize(title_style))
    for number in range(len(rows)):
        lines.append(Content("").join(_cells(columns, [cells[number] for cells in texts], widths, gaps)))
    return lines


def fit_cells(text: Content, width: int) -> Content:
    """Cut a text to ``width`` cells, in its middle; one with wide characters at its end."""
    if text.cell_length <= width:
        return text
    if text.cell_length != len(text) or width < 3:
        return text.truncate(width, ellipsis=True)
    end = width // 2
    return text[: width - end - 1] + "…" + text[len(text) - end :]


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
        cell = _padded(cell, gap + missing, 0) if column.right else _padded(cell, 0, missing).pad_left(gap)
        cells.append(cell)
    return cells


def _padded(text: Content, left: int, right: int) -> Content:
    """Add spaces; the styles that a text begins and ends with reach over them."""
    spans = [
        Span(start + left if start else 0, end + left + (right if end == len(text) else 0), style)
        for start, end, style in text.spans
    ]
    return Content(f"{' ' * left}{text.plain}{' ' * right}", spans)
