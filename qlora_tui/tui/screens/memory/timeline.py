"""The timeline of the Memory screen: memory while the model is being loaded, and during a training step.

The graph has the same parts as the bars of the peaks, in the same colors or textures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from textual.content import Content

from qlora_tui.formatting import GIB, format_bytes
from qlora_tui.memory.step import PHASES, Moment, Phase
from qlora_tui.tui.render.canvas import join_cells
from qlora_tui.tui.render.plot import label
from qlora_tui.tui.screens.memory.step_panels import (
    PARTS,
    BarPart,
    is_far_above,
    part_of,
)

TIMELINE = "Loading and a training step (GiB)"
_SHARES: dict[Phase, int] = {"loading": 3, "forward": 5, "loss": 2, "backward": 7, "optimizer": 3}
"""Relative width of each phase in the graph. Widths do not stand for durations, which are unknown."""
_NAMES: dict[Phase, str] = {"loading": "load"}
_EIGHTHS = " ▁▂▃▄▅▆▇"
_FROM_THE_BOTTOM = ("base weights", "adapter", "overhead", "activations", "loss")
"""Order of the parts in the graph, from the bottom: first parts of constant size, then parts that vary."""
_LEAST_FILLED, _LEAST_TEXTURED = 1 / 16, 1 / 4
"""Smallest fraction of a cell that is drawn: as a block, or as a texture, which fills the whole cell."""
_STEPS, _MAX_STEP_ROWS = (1, 2, 4, 5, 8), 5
"""``_STEPS``: distances between two labels, times a power of ten, in GiB. ``_MAX_STEP_ROWS``: maximum
distance in rows; the minimum is two.
"""
_FREE = " ─╎"
"""Characters that a label may replace: an empty cell, the limit line, and the line between phases.
"""
_LEAST_ROWS = 0.5
"""Minimum height of a part, in rows. A part that is lower in all columns takes the look of the part below."""


@dataclass(frozen=True)
class _GraphColumn:
    """One column of the graph. If several moments fall into the column, it shows the moment with the most
    memory.
    """

    phase: Phase
    parts: tuple[tuple[BarPart, int], ...]
    total_bytes: int


def timeline_title(moments: tuple[Moment, ...], limit_bytes: int, peak_time: str) -> Content:
    """Return the title of the timeline, with the time of the peak and, if the limit is not in the graph, the
    limit. ``peak_time``: as :func:`peak_time` returns it.
    """
    when = f", peak {peak_time}"
    if is_far_above(limit_bytes, max(moment.total_bytes for moment in moments)):
        when += f", far below the limit of {format_bytes(limit_bytes)}"
    return Content.assemble(TIMELINE, (when, "$text-muted not bold"))


def timeline_lines(
    moments: tuple[Moment, ...], limit_bytes: int, is_even: bool, width: int, height: int
) -> list[Content]:
    """Return ``height`` lines: the graph, with a scale in GiB on its left, and a last line with the names of
    the phases. If ``height`` is less than three, return no lines.

    A label of the scale stands for the middle of its row; 0 is in the row of the phases. Each cell shows the
    largest of its parts. Parts that are too low to be seen take the look of the part below, but the label of
    the peak has the sizes of all parts, if there is room. Dashed lines above the graph separate the phases.

    ``is_even``: whether cells have blocks instead of textures. If only one part can be seen, the graph has
    dim blocks instead of its texture.
    """
    rows = height - 1
    if rows < 2:
        return []
    peak = max(moment.total_bytes for moment in moments)
    limit_is_shown = not is_far_above(limit_bytes, peak)
    step_gib, step_rows = _scale(peak, limit_bytes if limit_is_shown else 0, rows)
    row_bytes = step_gib * GIB / step_rows
    labels = {row: label(row // step_rows * step_gib, step_gib) for row in range(0, rows + 1, step_rows)}
    gutter = max(map(len, labels.values())) + 1
    columns = _columns(moments, max(len(PHASES), width - gutter))
    drawn = _visible_parts(columns, row_bytes)
    # One texture would only hide how the total changes, so draw the total with blocks instead.
    is_total = not is_even and len(set().union(*drawn)) == 1
    is_even = is_even or is_total
    starts = [place for place in range(1, len(columns)) if columns[place].phase != columns[place - 1].phase]
    limit_row = min(rows, round(limit_bytes / row_bytes)) if limit_is_shown else None
    peak_column = max(range(len(columns)), key=lambda place: columns[place].total_bytes)
    least = _LEAST_FILLED if is_even else _LEAST_TEXTURED
    grid = []
    for row in range(rows, 0, -1):
        cells = [
            _cell(column, parts, row, row_bytes, limit_bytes, is_even=is_even)
            for column, parts in zip(columns, drawn, strict=True)
        ]
        if is_total:
            cells = [(glyph, style if style == "$error" else "dim") for glyph, style in cells]
        for place in starts:
            if cells[place][0] == " " and (limit_row is None or row < limit_row):
                cells[place] = ("╎", "dim")
        if row == limit_row:
            _draw_limit(cells, limit_bytes)
        grid.append(cells)
    above = rows - 1 - int(peak / row_bytes + 0.5 - least)
    if above >= 0:
        _draw_peak(grid, above, peak_column, columns[peak_column])
    lines = []
    for row, cells in zip(range(rows, 0, -1), grid, strict=True):
        text = labels.get(row, "")
        edge = Content.styled(f"{text:>{gutter - 1}}{'┤' if text else '│'}", "dim")
        lines.append(edge + join_cells(cells))
    return [*lines, _foot(columns, labels[0], gutter, columns[peak_column].phase)]


def _scale(peak_bytes: int, limit_bytes: int, rows: int) -> tuple[float, int]:
    """Return the distance between two labels, in GiB and in rows. The distance is selected for the shortest
    axis with room for the limit, the peak, and a row above the peak. The axis has ``rows`` rows above the row
    for 0 bytes.
    """
    peak, limit = peak_bytes / GIB, limit_bytes / GIB
    power = math.floor(math.log10(max(peak, limit)))
    powers = range(power - 2, power + 2)
    scales = [
        (round(size * 10.0**power, 9), step_rows)
        for size, power, step_rows in product(_STEPS, powers, range(2, min(_MAX_STEP_ROWS, rows) + 1))
    ]
    high = max(limit / (rows + 0.5), peak / (rows - 0.5))
    fitting = [(step, step_rows) for step, step_rows in scales if step / step_rows >= high]
    return min(fitting, key=lambda scale: (round(scale[0] / scale[1], 9), scale[1]))


def _columns(moments: tuple[Moment, ...], width: int) -> list[_GraphColumn]:
    """Return ``width`` columns of the graph, divided among the phases."""
    total, done = sum(_SHARES.values()), 0
    edges = [0]
    for phase in PHASES:
        done += _SHARES[phase]
        edges.append(round(done / total * width))
    columns = []
    for phase, (start, end) in zip(PHASES, pairwise(edges), strict=True):
        own = [moment for moment in moments if moment.phase == phase]
        number = end - start
        for place in range(number):
            first = place * len(own) // number
            last = max(first + 1, (place + 1) * len(own) // number)
            columns.append(_column(max(own[first:last], key=lambda moment: moment.total_bytes)))
    return columns


def _column(moment: Moment) -> _GraphColumn:
    sums = dict.fromkeys(PARTS, 0)
    for key, size in moment.items.items():
        sums[part_of(key)] += size
    ordered = sorted(sums.items(), key=lambda part: _FROM_THE_BOTTOM.index(part[0].name))
    return _GraphColumn(moment.phase, tuple(ordered), moment.total_bytes)


def _visible_parts(columns: Sequence[_GraphColumn], row_bytes: float) -> list[Counter[BarPart]]:
    """Return the size of each part of each column, in bytes, in the order of the graph. Parts that are lower
    than :data:`_LEAST_ROWS` in all columns are added to the part below or, if there is none, to the lowest
    part that is higher. If there is none either, they are added to the part with the largest size.
    """
    most: Counter[BarPart] = Counter()
    for column in columns:
        most |= Counter(dict(column.parts))
    largest = max(most, key=lambda part: most[part])
    drawn = []
    for column in columns:
        seen = [part for part, _ in column.parts if most[part] >= _LEAST_ROWS * row_bytes]
        look, sizes = next(iter(seen), largest), Counter[BarPart]()
        for part, size in column.parts:
            look = part if part in seen else look
            sizes[look] += size
        drawn.append(sizes)
    return drawn


def _cell(
    column: _GraphColumn,
    parts: Counter[BarPart],
    row: int,
    row_bytes: float,
    limit_bytes: int,
    *,
    is_even: bool,
) -> tuple[str, str]:
    """Return (character, style) of a cell: the look of its largest part or, of equal parts, of the lowest. A
    cell that is partly filled is drawn with a block in steps of an eighth of a cell; with textures, it is
    either full or empty. Memory above the limit is drawn in the error color.

    ``parts``: as :func:`_visible_parts` returns them.
    """
    low, high = (row - 0.5) * row_bytes, (row + 0.5) * row_bytes
    filled = (min(column.total_bytes, high) - low) / row_bytes
    if filled < (_LEAST_FILLED if is_even else _LEAST_TEXTURED):
        return " ", ""
    begin, shares = 0, dict[BarPart, float]()
    for part, size in parts.items():
        shares[part] = min(begin + size, high) - max(begin, low)
        begin += size
    block = "█" if filled >= 15 / 16 else _EIGHTHS[round(filled * 8)]
    glyph, style = max(shares, key=lambda part: shares[part]).drawn(is_even=is_even, block=block)
    # In a column above the limit, the error color begins in the cell that contains the limit.
    return glyph, "$error" if min(high, column.total_bytes) > limit_bytes else style


def _draw_limit(cells: list[tuple[str, str]], limit_bytes: int) -> None:
    """Draw the limit into the empty cells of its row. If there is room, write its label on the left."""
    text = f" limit {format_bytes(limit_bytes)} "
    for place, (glyph, _) in enumerate(cells):
        if glyph == " ":
            cells[place] = ("─", "$warning")
    if all(glyph == "─" for glyph, _ in cells[1 : len(text) + 1]):
        cells[1 : len(text) + 1] = [(letter, "$warning") for letter in text]


def _draw_peak(grid: list[list[tuple[str, str]]], row: int, place: int, column: _GraphColumn) -> None:
    """Write the size of the peak and of its parts, the largest first, with ``▾`` at ``place`` in ``row``,
    which is above the column of the peak. If the row has too little room, the sizes are in the row above or,
    if that is not free, in ``row`` without ``▾``. If they do not fit at all, only the peak has its size.
    """
    peak = f"peak {format_bytes(column.total_bytes)}"
    sizes = sorted(((part, size) for part, size in column.parts if size), key=lambda each: -each[1])
    parts = ": " + ", ".join(f"{part.name} {format_bytes(size)}" for part, size in sizes)
    long, short = f"{peak}{parts}", peak
    shifted = max(0, min(place, len(grid[row]) - len(long) - 2))
    tries = [(row, place, f"▾ {long} "), (row, place - len(long) - 2, f" {long} ▾")]
    tries += [(at, shifted, f" {long} ") for at in (row - 1, row) if at >= 0]
    tries += [(row, place, f"▾ {short} "), (row, place - len(short) - 2, f" {short} ▾")]
    for at, start, text in tries:
        room = slice(start, start + len(text))
        cells = grid[at]
        if at != row and grid[row][place][0] not in _FREE:
            continue
        if start >= 0 and room.stop <= len(cells) and all(glyph in _FREE for glyph, _ in cells[room]):
            plain = range(text.index(peak) + len(peak), len(text.rstrip(" ▾")))
            cells[room] = [(each, "" if number in plain else "bold") for number, each in enumerate(text)]
            if at != row:
                grid[row][place] = ("▾", "bold")
            return


def _foot(columns: list[_GraphColumn], zero: str, gutter: int, peak_phase: Phase) -> Content:
    """Return the line below the graph, with the label ``zero`` for 0 bytes, and each phase's name at the
    column where the phase begins. The name of the phase with the peak is bold.
    """
    parts: list[tuple[str, str]] = [(f"{zero + '┴':>{gutter}}", "dim")]
    for phase in PHASES:
        cells = sum(column.phase == phase for column in columns)
        name = f"{_NAMES.get(phase, phase)}"[: max(0, cells - 1)]
        parts.append((f"{name:<{cells}}", "bold" if phase == peak_phase else "dim"))
    return Content.assemble(*parts)
