"""The timeline of the Memory screen: memory while the model is being loaded, and during a training step.

The graph has the same parts as the bars of the peaks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from operator import itemgetter

from textual.content import Content
from textual.widget import Widget

from qlora_tui.formatting import GIB, format_bytes
from qlora_tui.memory.step import PHASES, Moment, Phase
from qlora_tui.tui.render.canvas import join_cells
from qlora_tui.tui.render.plot import label
from qlora_tui.tui.screens.memory.step_panels import (
    PARTS,
    BarPart,
    even_colors,
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
_LEAST_FILLED = 1 / 16
"""Smallest part of a cell that is drawn, as a fraction of the cell. Smaller parts are left out."""
_STEPS, _MAX_STEP_ROWS = (1, 2, 4, 5, 8), 5
"""``_STEPS``: distances between two labels, times a power of ten, in GiB. ``_MAX_STEP_ROWS``: maximum
distance in rows; the minimum is two.
"""
_TOTAL = BarPart("total", "█", "$primary", 60, frozenset())
"""The single part that is drawn if the graph has too few rows to show all parts."""
_ALL_PARTS, _ONE_PART = " all parts together ", " one part in a cell "
_TWO_PARTS = " at most two parts in a cell "
"""Notes on the colors and textures of the graph."""
_FREE = " ─╎"
"""Characters that a label or a note may replace: an empty cell, the limit line, and the line between phases.
"""
_MIN_PEAK_ROWS = 8
"""Minimum height of the peak, in rows, at which the graph shows the parts. In fewer rows, a cell would
contain several parts, but it can have only two colors.
"""


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
    moments: tuple[Moment, ...],
    limit_bytes: int,
    widget: Widget,
    width: int,
    height: int,
) -> list[Content]:
    """Return ``height`` lines: the graph, with a scale in GiB on its left, and a last line with the names of
    the phases. If ``height`` is less than three, return no lines.

    A label of the scale stands for the middle of its row; 0 is in the row of the phases. On a terminal with
    few colors, each cell shows one part. On other terminals, a cell shows at most two parts; if there are too
    few rows to show the parts, the graph shows only their total. Dashed lines above the graph separate the
    phases.

    ``widget``: the widget on which the graph is drawn.
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
    even = even_colors(widget)
    sums = _sums(columns)
    note = _TWO_PARTS if even else _ONE_PART
    if even and not _has_room_for_parts(columns, row_bytes, peak, sums):
        note = _ALL_PARTS
        columns = [replace(column, parts=((_TOTAL, column.total_bytes),)) for column in columns]
    starts = [place for place in range(1, len(columns)) if columns[place].phase != columns[place - 1].phase]
    limit_row = min(rows, round(limit_bytes / row_bytes)) if limit_is_shown else None
    peak_column = max(range(len(columns)), key=lambda place: columns[place].total_bytes)
    lines = []
    for row in range(rows, 0, -1):
        text = labels.get(row, "")
        edge = Content.styled(f"{text:>{gutter - 1}}{'┤' if text else '│'}", "dim")
        cells = [_cell(column, row, row_bytes, limit_bytes, sums, even) for column in columns]
        for place in starts:
            if cells[place][0] == " " and (limit_row is None or row < limit_row):
                cells[place] = ("╎", "dim")
        if row == limit_row:
            _draw_limit(cells, limit_bytes)
        if row == int(peak / row_bytes + 0.5 - _LEAST_FILLED) + 1:
            _draw_peak(cells, peak_column, peak)
        if row == rows:
            _draw_note(cells, note)
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


def _sums(columns: Sequence[_GraphColumn]) -> Counter[BarPart]:
    """Return the sum of each part over all columns, in bytes."""
    sums: Counter[BarPart] = Counter()
    for column in columns:
        sums.update(dict(column.parts))
    return sums


def _has_room_for_parts(
    columns: Sequence[_GraphColumn],
    row_bytes: float,
    peak: int,
    sums: Mapping[BarPart, int],
) -> bool:
    """Return whether the graph is tall enough to show the parts, at most two in a cell. The peak must be at
    least :data:`_MIN_PEAK_ROWS` high, and every part that is taller than an eighth of a row in any column
    must be visible in at least one cell.
    """
    rows = int(peak / row_bytes + 0.5)
    if rows < _MIN_PEAK_ROWS:
        return False
    needed = {part for column in columns for part, size in column.parts if size * 8 > row_bytes}
    cells = (_parts_of_cell(column, row, row_bytes) for column in columns for row in range(1, rows + 1))
    return needed <= {part for cell in cells for part in _drawn_parts(cell, sums, is_even=True)}


def _drawn_parts(
    covered: Sequence[tuple[BarPart, float]], sums: Mapping[BarPart, int], *, is_even: bool
) -> list[BarPart]:
    """Return the parts that a cell shows, at most two, the lower part first. The list is empty if the cell is
    almost empty.

    The preferred one of several parts is the part with the smallest total over the whole graph, since it
    might not be visible in other cells.

    A cell can show two parts only if it is full and ``is_even`` is True. The first one is the lowest part of
    the cell. The second one is the preferred part among those above it that cover at least an eighth of the
    cell. If the cell shows only one part, this is its largest part or, without ``is_even``, the preferred
    part among those that are at least half as large as the largest.
    """
    filled = sum(share for _, share in covered)
    if filled < _LEAST_FILLED:
        return []
    (lowest, share), (largest, most) = covered[0], max(covered, key=itemgetter(1))
    if not is_even:
        return [min((part for part, size in covered if size >= most / 2), key=lambda part: sums[part])]
    above = [part for part, size in covered[1:] if size >= 1 / 8]
    if filled < 15 / 16 or not above or not 1 / 16 < share < 15 / 16:
        return [largest]
    return [lowest, min(above, key=lambda part: sums[part])]


def _parts_of_cell(column: _GraphColumn, row: int, row_bytes: float) -> list[tuple[BarPart, float]]:
    """Return (part, fraction of the cell that the part covers), from the bottom of the cell."""
    low, high = (row - 0.5) * row_bytes, (row + 0.5) * row_bytes
    begin, end, covered = 0, 0, list[tuple[BarPart, float]]()
    for part, size in column.parts:
        end += size
        share = (min(end, high) - max(begin, low)) / row_bytes
        covered += [(part, share)] if share > 0 else []
        begin = end
    return covered


def _cell(
    column: _GraphColumn,
    row: int,
    row_bytes: float,
    limit_bytes: int,
    sums: Mapping[BarPart, int],
    even: Mapping[str, str],
) -> tuple[str, str]:
    """Return (character, style) of a cell. A cell that is partly filled or has two parts is drawn with a
    block character, in steps of an eighth of a cell. If cells have textures, such a block is dim, since it
    would look brighter than the textures, which do not cover their whole cell. Memory above the limit is
    drawn in the error color.

    ``even``: the opaque color of each part, by the part's name, for cells with two parts; empty if cells have
    textures.
    """
    covered = _parts_of_cell(column, row, row_bytes)
    parts = _drawn_parts(covered, sums, is_even=bool(even))
    if not parts:
        return " ", ""
    filled = sum(share for _, share in covered)
    # In a column above the limit, the error color begins in the cell that contains the limit.
    is_over = min((row + 0.5) * row_bytes, column.total_bytes) > limit_bytes
    if filled < 15 / 16:
        block = parts[0].drawn(is_even=True)[1] if even else f"{parts[0].hue} dim"
        return _EIGHTHS[round(filled * 8)], "$error" if is_over else block
    if is_over or len(parts) == 1:
        glyph, style = parts[-1].drawn(is_even=bool(even), block="█")
        return glyph, "$error" if is_over else style
    lower, above = (even[part.name] for part in parts)
    return _EIGHTHS[min(7, max(1, round(covered[0][1] * 8)))], f"{lower} on {above}"


def _draw_limit(cells: list[tuple[str, str]], limit_bytes: int) -> None:
    """Draw the limit into the empty cells of its row. If there is room, write its label on the left."""
    text = f" limit {format_bytes(limit_bytes)} "
    for place, (glyph, _) in enumerate(cells):
        if glyph == " ":
            cells[place] = ("─", "$warning")
    if all(glyph == "─" for glyph, _ in cells[1 : len(text) + 1]):
        cells[1 : len(text) + 1] = [(letter, "$warning") for letter in text]


def _draw_peak(cells: list[tuple[str, str]], column: int, peak: int) -> None:
    """If there is room in this row, write the size of the peak, with ``▾`` above the column of the peak."""
    start, text = column, f"▾ peak {format_bytes(peak)} "
    if start + len(text) > len(cells):
        text = f" peak {format_bytes(peak)} ▾"
        start = max(0, column + 1 - len(text))
    if all(glyph in _FREE for glyph, _ in cells[start : start + len(text)]):
        cells[start : start + len(text)] = [(letter, "bold") for letter in text]


def _draw_note(cells: list[tuple[str, str]], text: str) -> None:
    """Write the note ``text`` at the right end of a row if there is room and no memory is drawn there."""
    room = slice(len(cells) - len(text) - 1, len(cells) - 1)
    if room.start > 0 and all(glyph in _FREE for glyph, _ in cells[room]):
        cells[room] = [(letter, "dim") for letter in text]


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
