"""Graphs in text: axes with round ranges, filled curves, and points in braille."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from operator import itemgetter

from textual.content import Content

from qlora_tui.tui.render.canvas import DOTS_HIGH, DOTS_WIDE, Canvas, Look
from qlora_tui.tui.render.meters import blocks, downsample
from qlora_tui.tui.render.series import NOT_A_NUMBER, Envelope

_GRID_PARTS = 4
"""Maximum number of parts that grid lines divide a graph into."""
_MANY_ROWS = 14
"""Minimum number of rows of a graph at which its lines are two dots thick, dotted lines are drawn, and the
areas under its curves are filled. In fewer rows, lines would hide each other, and areas would look like
stairs.
"""
LEAST_CHART = 7
"""Minimum height of a graph, in lines: five rows, a legend and a scale of x. In fewer lines, the curves are
described in words.
"""
_MIN_SPARK, _MAX_SPARK = 4, 24
"""Minimum and maximum width, in cells, of the small block chart that follows a curve's words when a graph is
described in words.
"""
_LEAST_BETWEEN = 2
"""Minimum number of rows from one grid line to the next."""
_FEW_LABELS = 1.5
"""Penalty factor for axes with only two labels. Of several possible axes, the one with the smallest product
of length and penalties is selected.
"""
_ROW_BELOW = 0.25
"""Penalty for each row below the lowest label of an axis, added to a factor of 1."""
_LESS_ROUND = 1.2
"""Penalty factor for axes whose labels are not 1, 2 or 5 × 10ⁿ apart, and have more digits."""
_ROUND = (1.0, 2.0, 5.0)
_TICK_STEPS = {1.0: 1, 2.0: 1, 5.0: 1, 2.5: 1, 1.5: 3, 3.0: 3, 4.0: 2, 6.0: 3}
"""Possible distances between labels, divided by a power of ten, and the number of round parts of each
distance. Labels are at multiples of such a part, such as 2.5, 4.0 and 5.5.
"""
_FEW_STEPS = 10.0
"""Minimum length of the step axis, in steps, unless the run ends sooner."""
_END_GRAINS = 40
"""The step axis ends at a multiple of a round number of steps. At most this many multiples fit on the axis.
"""
_FAR = 1e30
_EPSILON = 1e-12
"""Values on an axis, and their range, count as zero if they do not exceed this magnitude, so that the axis's
arithmetic stays finite.
"""
_FINE_PARTS = 60
"""The ends of a loss axis are multiples of a step that divides the range of losses into at most this many
parts.
"""
_LEAST_SPAN = 0.05
"""Minimum range of a loss axis relative to the loss."""
_LABEL_GAP = 2
"""Minimum gap between two labels of the x axis, in cells."""
_APART = 3
"""Minimum distance between two marks with the same symbol, in cells, so that the marks do not merge into a
line.
"""
_GRID, _GRID_STYLE = "┈", "$border-blurred dim"


@dataclass(frozen=True)
class Axis:
    """An axis from ``low`` to ``high``, inclusive, with its ``unit``: ``step``, ``loss``, ``tok/s``."""

    low: float
    high: float
    unit: str = ""
    named: float | None = None
    """The value whose label includes the unit; ``high`` if None."""

    def place(self, value: float, cells: int) -> int:
        """Return the index of the cell that contains a value, if the axis is divided into ``cells`` cells.
        Cell 0 is at ``low``.

        Values outside the axis are clamped to its ends.
        """
        share = (value - self.low) / (self.high - self.low)
        return min(max(round(share * (cells - 1)), 0), cells - 1)


def column_of(value: float, x: Axis, columns: int) -> int:
    """Return the column of cells for a value on the x axis, counted from the left."""
    return x.place(value, columns * DOTS_WIDE) // DOTS_WIDE


def row_of(value: float, y: Axis, rows: int) -> int:
    """Return the row of cells for a value on the y axis, counted from the top."""
    return _dot_row(value, y, rows, 1)


def _dot_row(value: float, y: Axis, rows: int, dots_high: int) -> int:
    """Return the row of dots for a value on the y axis, counted from the top. There are ``rows`` rows of
    cells, each ``dots_high`` dots high.

    The ends of the axis are in the middle of the lowest and highest row of cells, where their labels are.
    Values outside the graph are clamped to its first and last row.
    """
    share = min(max((value - y.low) / (y.high - y.low), -1.0), 2.0)
    row = rows * dots_high - 1 - math.floor((share * (rows - 1) + 0.5) * dots_high + 1e-9)
    return min(max(row, 0), rows * dots_high - 1)


def rounded(low: float, high: float, ticks: int = 12, unit: str = "") -> Axis:
    """Return an axis that contains ``low`` and ``high``, and that begins and ends at multiples of a round
    step. The step divides the range into at most ``ticks`` parts.

    If the range of values grows but stays within this axis, the result is the same, so the graph rarely
    jumps.
    """
    low, high = (min(max(value, -_FAR), _FAR) for value in (low, high))
    size = max(abs(low), abs(high))
    if high - low <= max(size * 1e-9, _EPSILON):
        spread = size * 0.1 if size > _EPSILON else 1.0
        low, high = low - spread, high + spread
    step = tick_step(low, high, ticks)
    return Axis(
        _clean(math.floor(low / step + 1e-9) * step), _clean(math.ceil(high / step - 1e-9) * step), unit
    )


def loss_axis(low: float, high: float) -> Axis:
    """Return the axis for a loss.

    The axis spans at least 5 % of the loss, so that a small change does not look like a large one. Its ends
    are close to the lowest and the highest loss, so that few rows remain free below and above the curve.
    """
    least = _LEAST_SPAN * max(abs(low), abs(high))
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    return rounded(low, high, _FINE_PARTS, "loss")


def so_far(done: float, total: float, unit: str = "", start: float = 0.0) -> Axis:
    """Return the axis of a run's steps. The axis begins at ``start``, which must not be negative, and ends at
    a round number at or shortly after ``done``, the last finished step. The label of ``done`` includes the
    unit.

    The end exceeds ``done`` by at most a few percent, but is at least ten steps after ``start``. Because the
    end is round, the axis does not change at every step. The axis does not extend beyond ``total``, unless
    ``total`` is less than ``done`` or ``start + 1``.
    """
    grain = max(1.0, tick_step(0.0, max(done - start, _FEW_STEPS), _END_GRAINS))
    end = max(math.ceil(done / grain - 1e-9) * grain, start + _FEW_STEPS)
    if total >= max(done, start + 1):
        end = min(end, total)
    return Axis(start, end, unit, done)


def tick_step(low: float, high: float, max_parts: int) -> float:
    """Return the smallest step of 1, 2 or 5 × 10ⁿ that divides the range into at most ``max_parts`` parts."""
    rough = (high - low) / max(1, max_parts)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * r for r in (*_ROUND, 10.0) if power * r >= rough * (1 - 1e-9))


def ticks(axis: Axis, most: int) -> list[tuple[float, str]]:
    """Return (value, label) for the ticks of an axis, in order. The ticks of a step axis are at whole
    numbers.
    """
    step = tick_step(axis.low, axis.high, most)
    if axis.unit == "step":
        step = max(step, 1.0)
    first = math.ceil(axis.low / step - 1e-9)
    last = math.floor(axis.high / step + 1e-9)
    values = [_clean(i * step) for i in range(first, last + 1)]
    return [(value, label(value, step)) for value in values]


def label(value: float, step: float) -> str:
    """Return the label of a tick: the shortest text for ``value`` that differs from the labels of the
    neighboring ticks, at a distance of ``step``. Examples are ``1.25``, ``400``, ``12k`` and ``1.5M``.
    """
    if value == 0:
        return "0"
    size = max(abs(value), step)
    for unit, letter, least in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)):
        if size >= least:
            return f"{value / unit:.{_decimals(step / unit)}f}{letter}"
    if size < 1e-3:
        return re.sub(r"\.?0*e-0?", "e-", f"{value:.2e}")
    return f"{value:,.{_decimals(step)}f}"


def _decimals(step: float) -> int:
    """Return how many decimals a step of at most two significant digits needs: 0 for 2, and 1 for 2.5."""
    fewest = max(0, -math.floor(math.log10(step) + 1e-9))
    return fewest + (not math.isclose(step, round(step, fewest)))


def _clean(value: float) -> float:
    # Rounded, since 3 × 0.1 gives 0.30000000000000004, but the tick is at 0.3.
    return float(f"{value:.12g}")


@dataclass(frozen=True)
class Curve:
    """An envelope that is drawn as a curve, and the curve's look."""

    envelope: Envelope
    name: str
    style: str
    glyph: str = ""
    """A symbol that is repeated along the curve, so that curves can be told apart without color; empty for
    none.
    """
    label: str = ""
    """Text next to the right end of the curve or, if there is no room, its left end; empty for none."""
    words: str = ""
    """Text that takes the place of the curve in a chart of few rows; empty to leave the curve out."""
    look: Look = "line"
    fill: str = ""
    """Color of the area under the curve; empty for none. An area is drawn only in a graph of many rows
    whose y axis begins at zero.
    """


@dataclass(frozen=True)
class Mark:
    """A symbol of one character, drawn in the cell that contains the point (``x``, ``y``) of a graph."""

    x: float
    y: float
    style: str
    symbol: str


@dataclass(frozen=True)
class Plot:
    """Everything that a graph shows. Later curves are drawn over earlier ones, and marks over curves.

    A cell that several lines share shows the dots of all of them, but can have only one color, which is
    selected by :meth:`Canvas.color_shared_cells`. A mark has its cell to itself. A dotted line is drawn
    over the others, in every other dash of the cells that it shares with them.
    """

    x: Axis
    y: Axis
    curves: tuple[Curve, ...] = ()
    marks: tuple[Mark, ...] = ()
    has_all_marks: bool = False
    """Whether all marks are drawn. If not, a mark that is too close to another mark with the same symbol is
    left out.
    """
    x_ticks: tuple[tuple[float, str], ...] = ()
    """(value, label) pairs for the ticks of the x axis, in order; empty for ticks at round numbers."""
    legend: tuple[tuple[str, str], ...] = ()
    """(text, style) items for the line above the graph. If they do not all fit, the last items are
    dropped.
    """
    notes: tuple[tuple[str, str], ...] = ()
    """(text, style) items of the legend that are also shown if the plot has too few rows for a graph."""
    empty: str = ""
    """Text to show instead of the graph if there are no curves and no marks."""
    gutter: int = 0
    """Minimum number of cells to the left of the graph, for aligning the x axes of stacked charts."""

    @property
    def is_empty(self) -> bool:
        """Whether only the text in ``empty`` is shown, because there are no curves and no marks."""
        return bool(self.empty) and not self.marks and not any(curve.envelope.xs for curve in self.curves)


def no_plot(text: str) -> Plot:
    """Return a plot that shows only this text."""
    return Plot(Axis(0, 1), Axis(0, 1), empty=text)


def plot(what: Plot, width: int, height: int) -> list[Content]:
    """Return the plot as ``height`` lines: the legend, the graph with the scale of y on the left, and the
    scale of x below. If ``height`` is less than ``LEAST_CHART``, the first line describes the curves in
    words, and the other lines are blank.

    A value that is not finite interrupts its curve and is marked at the bottom. No line is drawn across a gap
    without finite values.
    """
    if what.is_empty:
        return _nothing(what, width, height)
    if height < LEAST_CHART:
        return _in_words(what, width, height)
    rows = height - 2
    y, labels = _even(what.y, rows)
    what = replace(what, y=y)
    grid_rows = list(labels)
    labels_end = max(len(y.unit), *map(len, labels.values()))
    gutter = max(what.gutter, labels_end + 1)
    columns = max(2, width - gutter)
    canvas = Canvas(columns, rows)
    canvas.cells = {(column, row): (_GRID, _GRID_STYLE) for row in grid_rows for column in range(columns)}
    for curve in what.curves:
        if curve.look != "dotted":
            _draw_curve(canvas, curve, what.x, what.y)
    canvas.color_shared_cells()
    for number, curve in enumerate(what.curves):
        _set_glyphs(canvas, curve, what.x, what.y, number, len(what.curves))
    _set_marks(canvas, what)
    for curve in what.curves:
        if curve.look == "dotted":
            _draw_curve(canvas, curve, what.x, what.y)
    for curve in reversed(what.curves):
        _set_label(canvas, curve, what.x, what.y)
    lines = [_legend(what, labels_end, width)]
    for row in range(rows):
        lines.append(Content.styled(f"{labels.get(row, ''):>{gutter - 1}} ", "dim") + canvas.line(row))
    return [*lines, _foot(what, gutter, columns)]


def _nothing(what: Plot, width: int, height: int) -> list[Content]:
    """Return ``height`` lines that are blank except for the middle one, which has the text ``what.empty``."""
    lines = [Content("")] * height
    lines[height // 2] = Content.styled(what.empty.center(width).rstrip(), "dim")
    return lines


def _in_words(what: Plot, width: int, height: int) -> list[Content]:
    """Return ``height`` lines that are blank except for the first one. The first line has, for each curve,
    its words followed by the curve as blocks; the notes come last:
    ``train 5.399 → 2.531 ▇▄▂▁  ★ best 2.781 at 60``.
    """
    curves = [curve for curve in what.curves if curve.words and curve.envelope.low is not None]
    texts = [*(curve.words for curve in curves), *(text for text, _ in what.notes)]
    room = width - sum(len(text) + 2 for text in texts)
    drawn = max(0, min(len(curves), (room + 2) // (_MIN_SPARK + 1)))
    cells = min(_MAX_SPARK, (room + 2) // drawn - 1) if drawn else 0
    items = []
    for number, curve in enumerate(curves):
        spark = f" {_spark(curve.envelope, cells)}" if number < drawn else ""
        items.append((curve.words + spark, curve.style))
    line = Content("")
    for text, style in (*items, *what.notes):
        item = Content.styled(text, style)
        line = Content("  ").join(filter(None, (line, item)))
    return [line, *[Content("")] * (height - 1)]


def _spark(envelope: Envelope, cells: int) -> str:
    """Return a curve as at most ``cells`` blocks, from its lowest to its highest value."""
    low, high = envelope.low or 0.0, envelope.high or 0.0
    ends = zip(envelope.lows, envelope.highs, envelope.broken, strict=True)
    values = [math.nan if broken else (least + most) / 2 for least, most, broken in ends]
    return blocks(downsample(values, min(cells, len(values))), low, high, 1)[0]


def _even(y: Axis, rows: int) -> tuple[Axis, dict[int, str]]:
    """Return the axis and its labels by row. The axis is extended as little as possible to make the
    distance between ticks a whole number of rows. If there are too few rows for such ticks, the axis is
    unchanged and has the ticks that fit.
    """
    span, best = y.high - y.low, (math.inf, y, 0.0, 0.0)
    first = math.floor(math.log10(span)) if span > 0 else 0
    for (size, parts), power in product(_TICK_STEPS.items(), (first - 1, first)):
        step = _clean(size * 10.0**power)
        for between, part in product(range(_LEAST_BETWEEN, rows), range(parts)):
            row, start = step / between, step * part / parts
            for grain in (step, row):
                # A value up to half a row below the lowest label, or above the highest one, is in its row.
                low = math.floor((y.low + row / 2 - start) / grain + 1e-9) * grain + start
                high = low + (rows - 1) * row
                labeled = _multiples(low - start, high - start, step)
                if high + row / 2 >= y.high - step * 1e-9 and 2 <= len(labeled) <= _GRID_PARTS + 1:
                    below = round((start + labeled[0] * step - low) / row)
                    cost = row * (1 + _ROW_BELOW * below)
                    cost *= (_FEW_LABELS if len(labeled) == 2 else 1) * (1 if size in _ROUND else _LESS_ROUND)
                    best = min(best, (cost, replace(y, low=low, high=high), step, start), key=itemgetter(0))
    _, y, step, start = best
    if not step:
        return y, {row_of(value, y, rows): text for value, text in ticks(y, max(1, rows - 1))}
    values = [_clean(start + number * step) for number in _multiples(y.low - start, y.high - start, step)]
    return y, {row_of(value, y, rows): label(value, step) for value in values}


def _multiples(low: float, high: float, step: float) -> range:
    """Return the whole numbers whose multiples of ``step`` are from ``low`` to ``high``."""
    return range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)


def _draw_curve(canvas: Canvas, curve: Curve, x: Axis, y: Axis) -> None:
    if curve.look == "dotted" and canvas.height < _MANY_ROWS:
        # So close to another line, the dots of both would merge. The marks of the curve remain.
        return
    envelope, dots_wide = curve.envelope, canvas.width * DOTS_WIDE
    dots: set[tuple[int, int]] = set()
    before: tuple[int, int, int] | None = None
    broken_columns = set()
    for value, low, high, broken in zip(
        envelope.xs, envelope.lows, envelope.highs, envelope.broken, strict=True
    ):
        if not x.low <= value <= x.high:
            before = None
            continue
        column = x.place(value, dots_wide)
        if broken:
            broken_columns.add(column // DOTS_WIDE)
        if low > high:
            before = None
            continue
        if curve.look == "points":
            # Draw only the lowest and the highest value. The values between them would form a vertical line.
            half_row = (y.high - y.low) / 2 / max(1, canvas.height - 1)
            ends = (value for value in (low, high) if -half_row <= value - y.low <= y.high - y.low + half_row)
            dots.update((column, _dot_row(value, y, canvas.height, DOTS_HIGH)) for value in ends)
            continue
        top, bottom = (_dot_row(end, y, canvas.height, DOTS_HIGH) for end in (high, low))
        dots.update((column, row) for row in range(top, bottom + 1))
        if before is not None and not broken:
            dots.update(_between(before, (column, top, bottom)))
        before = None if broken else (column, top, bottom)
    if curve.look == "line" and canvas.height >= _MANY_ROWS:
        dots |= {(column, row + 1) for column, row in dots if row + 1 < canvas.height * DOTS_HIGH}
    if curve.look == "dotted":
        dots = {(column, row) for column, row in dots if column % 2 == 0}
    canvas.settle(dots, f"{curve.style} dim" if curve.look == "dotted" else curve.style, curve.look)
    if curve.fill and canvas.height >= _MANY_ROWS and y.low <= 0:
        canvas.fill(dots, curve.fill)
    for column in broken_columns:
        canvas.cells[column, canvas.height - 1] = (NOT_A_NUMBER, "$error bold")


def _between(before: tuple[int, int, int], after: tuple[int, int, int]) -> Iterator[tuple[int, int]]:
    """Yield the dots of a line that connects two vertical segments, each given as (x, top, bottom). Each
    end of the line is the point of its segment that is closest to the middle of the other segment.
    """
    x0, top0, bottom0 = before
    x1, top1, bottom1 = after
    here = min(max((top1 + bottom1) // 2, top0), bottom0)
    goal = min(max((top0 + bottom0) // 2, top1), bottom1)
    slope = (goal - here) / max(1, x1 - x0)
    start = here
    for x in range(x0, x1):
        there = round(start + slope * (x + 1 - x0))
        middle = (here + there) // 2
        yield from ((x, row) for row in range(min(here, middle), max(here, middle) + 1))
        yield from ((x + 1, row) for row in range(min(there, middle), max(there, middle) + 1))
        here = there


def _set_glyphs(canvas: Canvas, curve: Curve, x: Axis, y: Axis, number: int, of: int) -> None:
    if not curve.glyph:
        return
    apart = 16
    due = apart * number // of + 2
    points = list(zip(curve.envelope.xs, curve.envelope.lows, curve.envelope.highs, strict=True))
    for place, low, high in [*points, *points[-1:]]:
        if low > high or not x.low <= place <= x.high:
            continue
        column = column_of(place, x, canvas.width)
        if column >= due or place == curve.envelope.xs[-1]:
            row = row_of((low + high) / 2, y, canvas.height)
            canvas.cells[column, row] = (curve.glyph, curve.style)
            due = column + apart


def _set_label(canvas: Canvas, curve: Curve, x: Axis, y: Axis) -> None:
    """Write the label of a curve next to its right end or, if there is no room, next to its left end. Without
    room at either end, the label is left out. A label must not cover lines, marks or other labels.
    """
    points = list(zip(curve.envelope.xs, curve.envelope.lows, strict=True))
    for place, value in (points[-1], points[0]) if curve.label and points else ():
        column, row = column_of(place, x, canvas.width), row_of(value, y, canvas.height)
        start = column + 2 if place == points[-1][0] else column - 1 - len(curve.label)
        cells = [(start + number, row) for number in range(len(curve.label))]
        if start >= 0 and cells[-1][0] < canvas.width and not any(cell in canvas.lines for cell in cells):
            for cell, character in zip(cells, curve.label, strict=True):
                canvas.set_symbol(cell, character, curve.style)
            return


def _set_marks(canvas: Canvas, what: Plot) -> None:
    """Draw the marks in order, so that later marks cover earlier ones. A mark outside the x axis, or one that
    :attr:`Plot.has_all_marks` describes as too close to another, is left out.
    """
    newest: dict[str, int] = {}
    for mark in what.marks:
        if not (what.x.low <= mark.x <= what.x.high and math.isfinite(mark.y)):
            continue
        column = column_of(mark.x, what.x, canvas.width)
        # Marks of several curves at the same x are in the same column, and all of them are drawn.
        if not what.has_all_marks and column - newest.get(mark.symbol, column) in range(1, _APART):
            continue
        newest[mark.symbol] = column
        canvas.set_symbol((column, row_of(mark.y, what.y, canvas.height)), mark.symbol, mark.style)


def _legend(what: Plot, gutter: int, width: int) -> Content:
    # Without room for all items, the name of y is not aligned with its labels.
    needed = sum(len(text) + 2 for text, _ in what.legend)
    line = Content.styled(f"{what.y.unit:>{min(gutter, max(1, width - needed))}}", "dim")
    for text, style in what.legend:
        item = Content("  ") + Content.styled(text, style)
        if line.cell_length + item.cell_length > width:
            break
        line += item
    return line


def _foot(what: Plot, gutter: int, columns: int) -> Content:
    """Return the line below the graph: the scale of x, with as many labels as fit. If the axis has a unit,
    the label of :attr:`Axis.named` includes the unit: ``step 95``. If this label, aligned with the end of the
    axis, covers the column of its value, the label is placed there, so that it does not move while the value
    grows.
    """
    x, most, text = what.x, max(1, columns // 12), " " * columns
    named = []
    if x.unit:
        value = x.high if x.named is None else x.named
        shown = f"{value:,.0f}" if x.unit == "step" else label(value, tick_step(x.low, x.high, most))
        named.append((value, f"{x.unit} {shown}"))
    for number, (value, name) in enumerate((*named, *(what.x_ticks or ticks(x, most)))):
        column, rightmost = column_of(value, x, columns), max(0, columns - len(name))
        is_at_end = number < len(named) and column >= rightmost
        start = rightmost if is_at_end else max(0, min(column - len(name) // 2, rightmost))
        end = start + len(name)
        if end <= columns and not text[max(0, start - _LABEL_GAP) : end + _LABEL_GAP].strip():
            text = f"{text[:start]}{name}{text[end:]}"
    return Content.styled(" " * gutter + text, "dim")


def overall(envelopes: Sequence[Envelope]) -> tuple[float, float] | None:
    """Return the lowest and the highest finite value of several envelopes; None if they have no finite
    values.
    """
    lows = [low for envelope in envelopes if (low := envelope.low) is not None]
    highs = [high for envelope in envelopes if (high := envelope.high) is not None]
    return (min(lows), max(highs)) if lows else None
