"""Tables as lines of text, with columns that are cut or left out to fit a width, and lists of labeled
facts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from rich.cells import cell_len
from textual.content import Content, Span

from qlora_tui.formatting import cut_range

Row = TypeVar("Row")
_CLAUSE_END = re.compile(r"[,:;](?= )|\.(?= \D)| (?=\()")
Fact: TypeAlias = tuple[str, str | Content] | Content
"""A (label, value) pair, or a text without a label."""


@dataclass(frozen=True, kw_only=True)
class Column(Generic[Row]):
    """A column of a table. Each line of the table shows an object of the type ``Row``."""

    text: Callable[[Row], str | Content]
    """Returns the column's text for a row: a string, which is shown in ``style``, or a Content with its own
    style.
    """
    title: str = ""
    width: int | None = None
    """Width in cells; None means as wide as its widest text or its title."""
    min_width: int = 1
    max_width: int | None = None
    """Maximum width of a column without a fixed width, in cells."""
    shrinks: bool = False
    """Whether the column shrinks, down to ``min_width``, if the table is too wide."""
    fills: bool = False
    """Whether the column takes the remaining width, but at least ``min_width``."""
    right: bool = False
    """Whether the column's texts are right-aligned."""
    style: str = ""
    gap: int = 2
    """Number of spaces before the column, unless it is the first."""
    shown_from: int = 0
    """Minimum width of the table, in cells, at which the column is shown."""
    dropped: int = 0
    """Position in the order in which columns are left out if the table is too wide; 0 for a column that is
    never left out.
    """
    shown_if_empty: bool = True
    """Whether the column is shown even if its text is empty in every row."""
    shown_if_same: bool = True
    """Whether the column is shown even if there are several rows and its text is the same in all of them."""
    shorter: Callable[[str, int], str] | None = None
    """Function that shortens a string to a width in characters, to use instead of ``cut_range``."""
    is_sentence: bool = False
    """Whether long texts are cut at their end (:func:`cut_sentence`); otherwise, ``cut_range`` selects the
    part to cut.
    """


def table(
    columns: Sequence[Column[Row]], rows: Sequence[Row], width: int, title_style: str = "dim"
) -> list[Content]:
    """Return a header line, if any column has a title, and a line for each row. Lines are at most ``width``
    cells wide if possible.

    Texts that are too long are cut in their least informative part (``cut_range``). If the columns do not fit
    even at their minimum widths, the last column that shrinks gets less than its minimum width.
    """
    columns = [column for column in columns if width >= column.shown_from and _is_shown(column, rows)]
    texts = [[_on_one_line(column.text(row)) for row in rows] for column in columns]
    widths = [_width(column, cells) for column, cells in zip(columns, texts, strict=True)]
    columns, texts, widths = _fitting(columns, texts, widths, width)
    gaps = [column.gap if number else 0 for number, column in enumerate(columns)]
    for number, column in enumerate(columns):
        left = width - sum(gaps) - sum(widths) + widths[number]
        if column.fills or (column.shrinks and left < widths[number]):
            is_last = not any(each.fills or each.shrinks for each in columns[number + 1 :])
            least = column.min_width if column.fills else min(column.min_width, widths[number])
            widths[number] = max(1 if is_last else least, left)
    lines = []
    if any(column.title for column in columns):
        titles = [Content.styled(column.title, title_style) for column in columns]
        lines.append(_line(columns, titles, widths, gaps).rstrip())
    return lines + [_line(columns, cells, widths, gaps) for cells in zip(*texts, strict=True)]


def fact_lines(facts: Sequence[Fact], width: int) -> list[Content]:
    """Return one or more lines for each fact, such as ``license apache-2.0``. Values form a column, and long
    values are wrapped in this column. A text without a label is not wrapped.
    """
    cells = max((len(fact[0]) for fact in facts if isinstance(fact, tuple)), default=0) + 2
    lines = []
    for fact in facts:
        if isinstance(fact, Content):
            lines.append(fact)
            continue
        label, value = fact
        text = Content(value) if isinstance(value, str) else value
        lines += hanging(Content.styled(f"{label:<{cells}}", "dim"), text, width)
    return lines


def hanging(head: Content, text: Content, width: int, least: int = 10) -> list[Content]:
    """Return ``head`` followed by ``text``, which is wrapped with a hanging indent. Lines are at most
    ``width`` cells wide, unless fewer than ``least`` cells would be left for the text. A period that would be
    alone on the last line is dropped.
    """
    cells = head.cell_length
    first, *others = text.wrap(max(least, width - cells)) or [Content("")]
    if others and others[-1].plain.strip() == ".":
        others.pop()
    return [head + first, *(Content(" " * cells) + other for other in others)]


def _is_shown(column: Column[Row], rows: Sequence[Row]) -> bool:
    """Return whether a column is shown. A column without ``shown_if_empty`` is hidden if all its texts are
    empty. A column without ``shown_if_same`` is hidden if there are several rows and all its texts are the
    same.
    """
    if column.shown_if_empty and column.shown_if_same:
        return True
    texts = {str(column.text(row)) for row in rows}
    return (column.shown_if_empty or any(texts)) and (column.shown_if_same or len(texts) > 1 or len(rows) < 2)


def _fitting(
    columns: Sequence[Column[Row]],
    texts: Sequence[list[str | Content]],
    widths: Sequence[int],
    width: int,
) -> tuple[list[Column[Row]], list[list[str | Content]], list[int]]:
    """Drop columns until the remaining columns fit ``width``. A column that shrinks or fills is counted at
    its minimum width. Return the remaining columns, their texts and their widths.
    """
    kept = list(zip(columns, texts, widths, strict=True))

    def least_width() -> int:
        least = (min(cells, c.min_width) if c.shrinks or c.fills else cells for c, _, cells in kept)
        return sum(least) + sum(column.gap for column, _, _ in kept[1:])

    while least_width() > width and (droppable := [each for each in kept if each[0].dropped]):
        kept.remove(min(droppable, key=lambda each: each[0].dropped))
    return [c for c, _, _ in kept], [cells for _, cells, _ in kept], [cells for _, _, cells in kept]


def _width(column: Column[Row], texts: Sequence[str | Content]) -> int:
    if column.width is not None:
        return column.width
    widest = max(map(_cells, (column.title, *texts)))
    return widest if column.max_width is None else min(widest, column.max_width)


def _on_one_line(text: str | Content) -> str | Content:
    return text.replace("\n", " ") if isinstance(text, str) else text


def _cells(text: str | Content) -> int:
    plain = text if isinstance(text, str) else text.plain
    return len(plain) if plain.isascii() else cell_len(plain)


def _line(
    columns: Sequence[Column[Row]], texts: Sequence[str | Content], widths: Sequence[int], gaps: Sequence[int]
) -> Content:
    """Return a row as a line, with each text cut or padded to the width of its column, in cells.

    Styles at the start and end of a text extend over its padding.
    """
    line, spans, at = "", list[Span](), 0
    for column, text, width, gap in zip(columns, texts, widths, gaps, strict=True):
        if column.shorter and isinstance(text, str) and _cells(text) > width:
            text = column.shorter(text, width)
        if _cells(text) > width:
            whole = Content.styled(text, column.style) if isinstance(text, str) else text
            text = cut_sentence(whole, width) if column.is_sentence else cut_name(whole, width)
        plain, styles = (text, None) if isinstance(text, str) else (text.plain, text.spans)
        missing = width - _cells(text)
        left, right = (gap + missing, 0) if column.right else (0, missing)
        at += 0 if column.right else gap
        end = at + left + len(plain) + right
        if styles is None:
            spans += [Span(at, end, column.style)] if column.style else []
        else:
            spans += [
                Span(
                    at + left + start if start else at,
                    at + left + stop if stop < len(plain) else end,
                    style,
                )
                for start, stop, style in styles
            ]
        line += f"{' ' * (at + left - len(line))}{plain}{' ' * right}"
        at = end
    return Content(line, spans)


def cut_sentence(text: Content, width: int) -> Content:
    """Shorten a text to the clauses that fit ``width`` cells. The part before a colon counts as a clause only
    if no other clause fits: ``Probably killed: the process ended.`` becomes ``Probably killed``. If no clause
    fits, cut the text anywhere.
    """
    if text.cell_length <= width:
        return text
    ends = [end for end in _CLAUSE_END.finditer(text.plain) if text[: end.start()].cell_length <= width]
    if not ends:
        return text.truncate(width, ellipsis=True)
    last = next((end for end in reversed(ends) if end[0] != ":"), ends[0])
    return text[: last.start()]


def cut_name(text: Content, width: int) -> Content:
    """Cut the text to ``width`` cells, and return it. ``cut_range`` selects the part to cut. If the text has
    wide characters, its end is cut instead.
    """
    if text.cell_length != len(text) or width < 3:
        return text.truncate(width, ellipsis=True)
    start, stop = cut_range(text.plain, width)
    return text[:start] + "…" + text[stop:]
