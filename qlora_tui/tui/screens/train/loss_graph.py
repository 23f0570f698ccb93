"""The loss of a run with small charts below it (learning rate, gradient norm, speed), all on one x axis.

An event in the graph is followed straight down to the charts. Each chart goes from zero to a round maximum:
scaled to its own range, a constant 98 % would look like 0 %. A value that is not a number is marked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from textual.content import Content

from qlora_tui.tui.render.charts import Axis, Curve, Plot, curve_rows, plot
from qlora_tui.tui.render.series import Envelope
from qlora_tui.tui.widgets.line_widgets import DiffWidget

_MIN_ROWS, _TALL_ROWS, _SPACED_ROWS = 9, 20, 30
"""Rows from which there are charts, from which they are two rows high, and from which they stand apart."""
_MIN_VALUE_CELLS = 7
"""Cells of a value such as ``1.27e-4``: the graph must not move with the number of digits."""
_STYLE = "$secondary"


@dataclass(frozen=True)
class StepChart:
    """One quantity over the steps."""

    name: str
    value: str
    """The last one, as text."""
    high: str
    """The highest value of the chart, as text."""
    envelope: Envelope
    top: float


class LossGraph(DiffWidget):
    """A plot, and charts below it; without room for the charts only their last values."""

    DEFAULT_CSS = """
    LossGraph {
        height: 1fr;
        min-height: 4;
    }
    """

    def __init__(self, empty: str) -> None:
        super().__init__()
        self._plot = Plot(Axis(0, 1), Axis(0, 1), empty=empty)
        self._charts: tuple[StepChart, ...] = ()

    def show(self, loss: Plot, charts: tuple[StepChart, ...]) -> None:
        """Draw these; repaints nothing where it looks the same."""
        if (loss, charts) != (self._plot, self._charts):
            self._plot, self._charts = loss, charts
            self.redraw()

    def draw(self, width: int, height: int) -> list[Content]:
        charts = self._charts
        if self._plot.is_empty or not charts:
            return plot(self._plot, width, height)
        if height < _MIN_ROWS:
            return [*plot(self._plot, width, height - 1), _values(charts)]
        names = max(len(chart.name) for chart in charts)
        values = max(_MIN_VALUE_CELLS, *(len(chart.value) for chart in charts))
        gutter = names + values + 2
        rows = 2 if height >= _TALL_ROWS else 1
        gap = [Content.styled("│".rjust(gutter), "dim")] if height >= _SPACED_ROWS else []
        rows_below = (rows + len(gap)) * len(charts)
        lines = plot(replace(self._plot, gutter=gutter), width, height - rows_below)
        below = [
            line
            for chart in charts
            for line in gap + _chart_lines(chart, self._plot.x, names, gutter, width - gutter, rows)
        ]
        return [*lines[:-1], *below, lines[-1]]


def _chart_lines(
    chart: StepChart, x: Axis, names: int, gutter: int, columns: int, rows: int
) -> list[Content]:
    """The chart, with name and value before its last row and its highest value before the first of two."""
    curve = Curve(chart.envelope, chart.name, _STYLE)
    drawn = curve_rows(curve, x, Axis(0.0, chart.top), columns, rows)
    value = Content.assemble((f"{chart.name:<{names}} ", "dim"), f"{chart.value:>{gutter - names - 2}}")
    heads = [Content.styled(chart.high.rjust(gutter - 1), "dim")] * (rows - 1) + [value]
    edges = "┤" * (rows - 1) + "│"
    return [
        Content.assemble(head, (edge, "dim"), row)
        for head, edge, row in zip(heads, edges, drawn, strict=True)
    ]


def _values(charts: tuple[StepChart, ...]) -> Content:
    return Content("   ").join(Content.assemble((f"{chart.name} ", "dim"), chart.value) for chart in charts)
