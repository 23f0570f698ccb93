"""Small charts: bars, meters, and columns of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from textual.content import Content

from qlora_tui.tui.render.series import NOT_A_NUMBER

_COLUMN_EIGHTHS = " ▁▂▃▄▅▆▇█"
_BROKEN = -1
_MIN_BAR = 6
"""Minimum width of a bar, in cells. If there is less room, the bar is left out."""
_BAR, _HALF_CELL, _TRACK = "▄▖▁"
STACKED = "▆"
"""Cell of a bar with several parts. Like the cells of ``bar``, it leaves space at its top, so that bars in
adjacent rows do not merge.
"""
CLIPPED = "▶"
"""Last cell of a bar that would be longer than the room for it."""
_FULL = 0.8


def bar(part: float, width: int, *, has_track: bool = True) -> str:
    """Return a bar of ``width`` cells. ``part`` is the filled fraction, which is rounded to half a cell. The
    bar of a fraction above 1 is clipped (``CLIPPED``). The filled part consists of low blocks. The rest is a
    thin track or, without ``has_track``, spaces.
    """
    if width and round(part, 2) > 1:
        return _BAR * (width - 1) + CLIPPED
    full, half = divmod(round(min(max(part, 0.0), 1.0) * width * 2), 2)
    return (_BAR * full + _HALF_CELL * half).ljust(width, _TRACK if has_track else " ")


def blocks(
    values: Sequence[float | None], low: float, high: float, height: int, *, is_apart: bool = False
) -> list[str]:
    """Return a column of blocks for each value, as ``height`` rows of characters, top row first.

    ``low`` and ``high`` are the values of the shortest and the tallest column. The shortest column is still
    visible, but None has an empty column. With ``is_apart``, the top eighth of the top row stays empty, so
    that stacked charts do not merge.
    """
    levels = height * 8 - is_apart
    rows = []
    filled = [_level(value, low, high, levels) for value in values]
    for row in range(height - 1, -1, -1):
        line = ""
        for level in filled:
            if level == _BROKEN:
                line += NOT_A_NUMBER if row == 0 else " "
            else:
                line += _COLUMN_EIGHTHS[min(max(level - row * 8, 0), 8)]
        rows.append(line)
    return rows


def history(
    values: Sequence[float | None], low: float, high: float, height: int, style: str
) -> list[Content]:
    """Return values over time as columns of blocks, in ``height`` rows. A value of ``low`` has the shortest
    column, and a value of ``high`` the tallest. The columns are dim, because they fill most of the chart and
    would outweigh a curve above them.
    """
    rows = blocks(values, low, high, height, is_apart=True)
    return [Content.styled(row, f"{style} dim") for row in rows]


def _level(value: float | None, low: float, high: float, levels: int) -> int:
    if value is None:
        return 0
    if not math.isfinite(value):
        return _BROKEN
    share = (value - low) / (high - low) if high > low else 0.0
    return max(1, round(min(max(share, 0.0), 1.0) * levels))


def downsample(values: Sequence[float], columns: int) -> list[float | None]:
    """Divide the values among the columns, and return the mean of each column: NaN if the column has a value
    that is not finite, and None for columns beyond the data.
    """
    if not values:
        return [None] * columns
    count = min(columns, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means: list[float | None] = []
    for start, end in pairwise(edges):
        part = values[start:end]
        means.append(sum(part) / len(part) if all(map(math.isfinite, part)) else math.nan)
    return means + [None] * (columns - count)


def level_style(share: float) -> str:
    """Return the color for a value, given as a fraction of its limit: the success color below 0.8, the
    warning color from 0.8 to below 1, and the error color for 1 or more.
    """
    return "$success" if share < _FULL else "$warning" if share < 1 else "$error"


def labeled(label: str, value: str | Content, cells: int) -> Content:
    """Return a label and its value, ``model SmolLM2-135M``, with the label padded to ``cells``."""
    return Content.assemble((f"{label:<{cells}}", "dim"), value)


def meter(label: str, share: float, value: str, cells: int, width: int) -> Content:
    """Return a label, a bar filled to the fraction ``share``, and a value: ``memory ▄▄▄▖▁▁▁▁ 18.2 of 24.0
    GiB``.

    The label takes ``cells`` cells. The line is ``width`` cells wide, and the bar fills the space between
    label and value.
    """
    of_bar = width - cells - len(value) - 1
    drawn = f"{bar(share, of_bar)} " if of_bar >= _MIN_BAR else ""
    return labeled(label, Content.assemble((drawn, level_style(share)), value), cells)
