"""The list of runs: a line for each, with as many columns as fit."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from textual.binding import BindingType
from textual.content import Content
from textual.events import Click
from textual.geometry import Region, Size
from textual.message import Message
from textual.strip import Strip

from qlora_tui.formatting import format_duration, format_float, format_loss, format_percent, truncate_middle
from qlora_tui.runs.run_summary import RunSummary
from qlora_tui.tui import clock
from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.render.charts import sparkline
from qlora_tui.tui.render.labels import result_label
from qlora_tui.tui.widgets.controls import LIST_KEYS
from qlora_tui.tui.widgets.line_widgets import LineView, render_line

MARKS = "ABCD"
"""Marks of runs selected to compare, unlike any sign of a state; the same letters are on their curves."""
_CURVE_WIDTH = 12
_LOSS_WIDTH = 9


@dataclass(frozen=True)
class _Column:
    title: str
    width: int
    """In cells; 0 takes what is left."""
    text: Callable[[RunSummary], str]
    min_width: int = 0
    """The whole list must be so wide for this column to be shown."""
    show_if_empty: bool = True
    """Whether it is shown where no run has anything in it."""
    right: bool = False


def when(summary: RunSummary, now: float) -> str:
    """``03:12`` today, ``23 Nov 03:12`` before."""
    at = summary.queued_at or summary.status.at
    if not at:
        return "NA"
    moment, today = time.localtime(at), time.localtime(now)
    return time.strftime("%H:%M" if moment[:3] == today[:3] else "%d %b %H:%M", moment)


def best_loss(summary: RunSummary) -> str:
    """``2.78``, or ``2.63*`` for the last training loss where none was measured, in its column's width."""
    loss, mark = (summary.loss, "*") if summary.best is None else (summary.best[0], "")
    if loss is None:
        return ""
    if not math.isfinite(loss):
        return f"{format_float(loss)}{mark}"
    texts = (format_loss(loss, digits) + mark for digits in (3, 2, 1))
    return next((text for text in texts if len(text) <= _LOSS_WIDTH), f"{loss:.0e}{mark}")


def _accuracy(summary: RunSummary) -> str:
    return "" if summary.accuracy is None else format_percent(summary.accuracy)


def _steps(summary: RunSummary) -> str:
    return f"{summary.step:,}/{summary.total_steps:,}" if summary.total_steps else ""


_COLUMNS = (
    _Column("queued", 12, lambda s: when(s, clock.now())),
    _Column("run", 0, lambda s: s.name),
    _Column("model", 26, lambda s: s.model, min_width=150),
    _Column("settings", 22, lambda s: s.settings, min_width=115),
    _Column("steps", 13, _steps, min_width=130, right=True),
    _Column("★ val", _LOSS_WIDTH, best_loss, right=True),
    _Column("exact", 5, _accuracy, right=True, show_if_empty=False),
    _Column("loss", _CURVE_WIDTH, lambda s: sparkline(s.losses, _CURVE_WIDTH) if s.losses else ""),
    _Column(
        "trained",
        11,
        lambda s: "" if s.seconds is None else format_duration(s.seconds),
        min_width=WIDE_CELLS,
        right=True,
    ),
)
_MIN_ENDING = 24
"""Cells from which the rest of a wide line says how a run ended."""
_TIME_OF_NAME = re.compile(r"-\d{8}-\d{4}(?=(-\d+)?$)")
"""Time in a generated name; it is also in the column "queued"."""
_HEAD = 14
"""Cells of the mark and the state before the columns."""


class RunTable(LineView):
    """One line a run, under a line of titles that stays."""

    BINDINGS: ClassVar[list[BindingType]] = [*LIST_KEYS]

    class Moved(Message):
        """The cursor is on another run."""

    class Opened(Message):
        """A run was clicked a second time."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: tuple[RunSummary, ...] = ()
        self._waiting: tuple[str, ...] = ()
        self._marked: tuple[str, ...] = ()
        self._drawn: list[Content] = []
        self._drawn_at = 0
        self._cursor = 0
        self._is_moved = False
        """Whether the user moved the cursor off the first run."""
        self.starts_at_top = True
        """Whether the next runs that are shown move the cursor to the first."""

    @property
    def current(self) -> RunSummary | None:
        """The run under the cursor."""
        return self._rows[self._cursor] if self._rows else None

    def start_at_top(self) -> None:
        """Put the cursor on the first run once they are read again, unless the user moved it."""
        self.starts_at_top = not self._is_moved

    def show(self, rows: Sequence[RunSummary], waiting: tuple[str, ...], marked: tuple[str, ...]) -> None:
        """Show these; the cursor stays on its run. Only lines that differ are painted."""
        current = self.current
        self._rows, self._waiting, self._marked = tuple(rows), waiting, marked
        names = [row.id for row in self._rows]
        grows = self.virtual_size.height != len(names) + 1
        if self.starts_at_top:
            self._cursor, self.starts_at_top = 0, False
        elif current is not None and current.id in names:
            self._cursor = names.index(current.id)
        self._cursor = min(self._cursor, max(0, len(names) - 1))
        self.virtual_size = Size(1, len(names) + 1)
        if grows:
            self.refresh(layout=True)
        self._redraw()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """A line for each run, and the titles: the panel below gets the rest."""
        return len(self._rows) + 1

    def action_move(self, places: int) -> None:
        """Move the cursor; the ends stop it."""
        self._go_to(self._cursor + places)

    def on_click(self, event: Click) -> None:
        line = event.y + round(self.scroll_y) - 1
        if event.y > 0 and 0 <= line < len(self._rows):
            if line == self._cursor:
                self.post_message(self.Opened())
            self._go_to(line)

    def watch_has_focus(self, has_focus: bool) -> None:
        super().watch_has_focus(has_focus)
        self._redraw()

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        if self._drawn_at != width:
            self._drawn_at, self._drawn = width, self._draw()
        line = 0 if y == 0 else y + round(self.scroll_y)
        content = self._drawn[line] if line < len(self._drawn) else Content("")
        return render_line(self, content, width)

    def _go_to(self, row: int) -> None:
        row = min(max(row, 0), max(0, len(self._rows) - 1))
        if row == self._cursor:
            return
        self._cursor = row
        self._is_moved, self.starts_at_top = row > 0, False
        # One line of the window is taken by the titles.
        self.scroll_to_region(Region(0, row, 1, 2), animate=False, force=True)
        self._redraw()
        self.post_message(self.Moved())

    def _redraw(self) -> None:
        before, self._drawn = self._drawn, self._draw()
        self._drawn_at = self.scrollable_content_region.width
        if len(before) != len(self._drawn):
            self.refresh()
            return
        for line, (old, new) in enumerate(zip(before, self._drawn, strict=True)):
            if not old.is_same(new):
                self.refresh_line(line)

    def _draw(self) -> list[Content]:
        width = self.scrollable_content_region.width
        columns = [
            column
            for column in _COLUMNS
            if width >= column.min_width and (column.show_if_empty or any(map(column.text, self._rows)))
        ]
        columns = [self._narrowed(column) for column in columns]
        taken = _HEAD + sum(column.width + 2 for column in columns)
        left = max(10, width - taken)
        free = min(left, max((len(row.name) for row in self._rows), default=left))
        titles = "".join(f"{_cut(c.title, c.width or free, right=c.right)}  " for c in columns)
        lines = [Content.styled(" " * _HEAD + titles, "dim")]
        for number, row in enumerate(self._rows):
            line = self._head(row) + "".join(
                f"{_cut(c.text(row), c.width or free, right=c.right)}  " for c in columns
            )
            if left - free >= _MIN_ENDING:
                ended = Content(row.status.detail.replace("\n", " ")).truncate(left - free, ellipsis=True)
                line += ended.stylize("dim")
            if number == self._cursor:
                plain = Content(line.plain).pad_right(max(0, width - line.cell_length))
                line = plain.stylize("reverse") if self.has_focus else line.stylize("bold")
            lines.append(line)
        return lines

    def _narrowed(self, column: _Column) -> _Column:
        """The column as wide as its texts, so that the names get the rest."""
        if not column.width:
            return column
        longest = max(len(column.title), *(len(column.text(row)) for row in self._rows), 0)
        return replace(column, width=min(column.width, longest))

    def _head(self, row: RunSummary) -> Content:
        mark = MARKS[self._marked.index(row.id)] if row.id in self._marked else " "
        sign, word, style = result_label(row.status.state, row.defect)
        if row.id in self._waiting:
            word = f"queue {self._waiting.index(row.id) + 1}"
        return Content.assemble((f"{mark} ", "$accent"), (f"{sign} {word:<10}", style))


def _cut(text: str, width: int, *, right: bool) -> str:
    text = text.replace("\n", " ")
    if len(text) > width:
        text = truncate_middle(_TIME_OF_NAME.sub("", text), width)
    return f"{text:>{width}}" if right else f"{text:<{width}}"
