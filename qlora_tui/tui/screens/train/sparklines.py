"""The widget of small block charts (rate, gradient norm, speed), each from zero to a fixed top.

Textual's own sparkline rescales itself, so that a constant 98 % looks like 0 %, and fails on NaN. Here the
scale is given and shown, a column without a sample is empty, and a NaN is marked. The loss is in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from textual.content import Content

from qlora_tui.tui.render.axis import Axis
from qlora_tui.tui.render.block_charts import blocks, over_axis
from qlora_tui.tui.render.series import Envelope
from qlora_tui.tui.widgets.diff_widget import DiffWidget


@dataclass(frozen=True)
class SparklineData:
    """One quantity over the axis that all charts share."""

    name: str
    value: str
    """The last one, as text."""
    scale: str
    """The range of the chart: ``0…2e-4``."""
    envelope: Envelope
    top: float
    style: str = "$primary"


class Sparklines(DiffWidget):
    """Charts side by side in one line, or stacked if the widget is tall enough."""

    DEFAULT_CSS = """
    Sparklines {
        height: 3;
    }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._charts: tuple[SparklineData, ...] = ()
        self._x = Axis(0, 1)

    def show(self, charts: tuple[SparklineData, ...], x: Axis) -> None:
        """Draw these; repaints nothing where it looks the same."""
        if (charts, x) != (self._charts, self._x):
            self._charts, self._x = charts, x
            self.redraw()

    def draw(self, width: int, height: int) -> list[Content]:
        charts = self._charts
        if not charts:
            return []
        if height < len(charts):
            return [self._in_one_line(charts, width)]
        names = max(len(s.name) for s in charts)
        values = max(len(s.value) for s in charts)
        scales = max(len(s.scale) for s in charts)
        lines: list[Content] = []
        for chart in charts:
            head = Content.assemble(
                (f"{chart.name:<{names}} ", "dim"),
                f"{chart.value:>{values}} ",
                (f"{chart.scale:>{scales}} ", "dim"),
            )
            rows = self._rows(chart, width - head.cell_length, height // len(charts))
            lines += [head + rows[0], *(Content(" " * head.cell_length) + row for row in rows[1:])]
        return lines

    def _in_one_line(self, charts: tuple[SparklineData, ...], width: int) -> Content:
        width_left = (width - 2 * (len(charts) - 1)) // len(charts)
        parts = []
        for chart in charts:
            head = Content.assemble((f"{chart.name} ", "dim"), f"{chart.value} ")
            parts.append(head + self._rows(chart, max(0, width_left - head.cell_length), 1)[0])
        return Content("  ").join(parts)

    def _rows(self, chart: SparklineData, width: int, height: int) -> list[Content]:
        values = over_axis(chart.envelope, self._x, width)
        return [Content.styled(row, chart.style) for row in blocks(values, 0.0, chart.top, height)]
