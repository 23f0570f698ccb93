"""Graph of the memory over one training step, divided like the bars, against the limit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from textual.content import Content

from qlora_tui.formatting import format_gib
from qlora_tui.memory.step import PHASES, Moment, Phase
from qlora_tui.tui.render.charts import Axis, join_cells, ticks
from qlora_tui.tui.screens.memory.peak_panel import PARTS, BarPart, part_of
from qlora_tui.tui.widgets.line_widgets import Drawing
from qlora_tui.tui.widgets.panel import Panel

_TITLE = "Loading and a training step (GiB)"
_SHARES: dict[Phase, int] = {"loading": 3, "forward": 5, "loss": 2, "backward": 7, "optimizer": 3}
"""Share of the width that each phase gets; how long it takes is not known."""
_NAMES: dict[Phase, str] = {"loading": "load"}
_EIGHTHS = " ▁▂▃▄▅▆▇"
_FROM_THE_BOTTOM = ("base weights", "adapter", "overhead", "activations", "loss")
"""Parts that stay the same come first, so that those that change are on top."""
_LIMIT_IN_VIEW = 2.5
"""The limit is drawn unless it is more than this many times the peak: then the step would be a flat line."""
_ABOVE_PEAK = 1.25


@dataclass(frozen=True)
class _GraphColumn:
    """What a column of the graph shows: the fullest of its moments."""

    phase: Phase
    parts: tuple[tuple[BarPart, int], ...]
    total_bytes: int


class TimelinePanel(Panel):
    """The graph under a title that says when memory is fullest."""

    def __init__(self) -> None:
        self._graph = Drawing()
        super().__init__(_TITLE, self._graph, id="timeline-panel")

    def show(self, moments: tuple[Moment, ...], limit_bytes: int, peak_time: str) -> None:
        """Show the moments of a step. ``peak_time``: ``while loading``, or ``backward of the last layer``."""
        is_in_step = peak_time != "while loading"
        peak = max(moment.total_bytes for moment in moments)
        when = f", fullest {'in ' if is_in_step else ''}{peak_time}"
        if not _is_limit_shown(peak, limit_bytes):
            when += f", far below the limit of {format_gib(limit_bytes)} GiB"
        self.show_title(Content.assemble(_TITLE, (when, "$text-muted not bold")))
        self._graph.show(partial(timeline_lines, moments, limit_bytes))


def _is_limit_shown(peak: int, limit_bytes: int) -> bool:
    return limit_bytes <= peak * _LIMIT_IN_VIEW


def timeline_lines(moments: tuple[Moment, ...], limit_bytes: int, width: int, height: int) -> list[Content]:
    """``height`` lines: the graph with its scale in GiB at the left, and the names of the phases below it."""
    rows = height - 1
    if rows < 2:
        return []
    peak = max(moment.total_bytes for moment in moments)
    limit_is_shown = _is_limit_shown(peak, limit_bytes)
    high = max(peak * _ABOVE_PEAK, limit_bytes * 1.02) if limit_is_shown else peak * _ABOVE_PEAK
    axis = Axis(0.0, high / (1 << 30), "GiB")
    scale = ticks(axis, max(2, rows // 2))
    gutter = max(len(text) for _, text in scale) + 1
    columns = _columns(moments, max(len(PHASES), width - gutter))
    labels = {min(rows - 1, int(value / axis.high * rows)): text for value, text in scale}
    limit_row = min(rows - 1, int(limit_bytes / high * rows)) if limit_is_shown else None
    peak_column = max(range(len(columns)), key=lambda place: columns[place].total_bytes)
    lines = []
    for row in range(rows - 1, -1, -1):
        text = labels.get(row, "")
        edge = Content.styled(f"{text:>{gutter - 1}}{'┤' if text else '│'}", "dim")
        cells = [_cell(column, row, high / rows, limit_bytes) for column in columns]
        if row == limit_row:
            _draw_limit(cells, limit_bytes)
        if row == int(peak / high * rows) + 1:
            _draw_peak(cells, peak_column, peak)
        lines.append(edge + join_cells(cells))
    return [*lines, _foot(columns, gutter, columns[peak_column].phase)]


def _columns(moments: tuple[Moment, ...], width: int) -> list[_GraphColumn]:
    """Give each phase its share of the columns."""
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


def _cell(column: _GraphColumn, row: int, cell_bytes: float, limit_bytes: int) -> tuple[str, str]:
    """Return the character and its style: the part with the most of the cell, an eighth block at the top."""
    low, high = row * cell_bytes, (row + 1) * cell_bytes
    filled = min(1.0, (column.total_bytes - low) / cell_bytes)
    if filled <= 0:
        return " ", ""
    begin, most, part = 0, 0.0, column.parts[0][0]
    for candidate, size in column.parts:
        covered = min(begin + size, high) - max(begin, low)
        if covered > most:
            most, part = covered, candidate
        begin += size
    # Of a column over the limit, also the cell that the limit is in.
    style = "$error" if min(high, column.total_bytes) > limit_bytes else part.style
    if filled >= 15 / 16:
        return part.glyph, style
    return _EIGHTHS[round(filled * 8)], style


def _draw_limit(cells: list[tuple[str, str]], limit_bytes: int) -> None:
    """Draw the limit where the graph is empty, with its name at the left."""
    text = f" limit {format_gib(limit_bytes)} GiB "
    for place, (glyph, _) in enumerate(cells):
        if glyph == " ":
            cells[place] = ("─", "$warning")
    if all(glyph == "─" for glyph, _ in cells[1 : len(text) + 1]):
        cells[1 : len(text) + 1] = [(letter, "$warning") for letter in text]


def _draw_peak(cells: list[tuple[str, str]], column: int, peak: int) -> None:
    """Write the peak over its column."""
    text = f" peak {format_gib(peak)} GiB "
    start = min(max(0, column - len(text) // 2), len(cells) - len(text))
    if all(glyph in " ─" for glyph, _ in cells[start : start + len(text)]):
        cells[start : start + len(text)] = [(letter, "bold") for letter in text]


def _foot(columns: list[_GraphColumn], gutter: int, peak_phase: Phase) -> Content:
    """Write the names of the phases where they begin, that of the peak in bold."""
    parts: list[tuple[str, str]] = [(f"{'└':>{gutter}}", "dim")]
    for phase in PHASES:
        cells = sum(column.phase == phase for column in columns)
        name = f"{_NAMES.get(phase, phase)}"[: max(0, cells - 1)]
        parts.append((f"{name:<{cells}}", "bold" if phase == peak_phase else "dim"))
    return Content.assemble(*parts)
