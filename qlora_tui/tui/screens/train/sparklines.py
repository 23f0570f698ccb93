"""Small charts of blocks, one value a column, from a fixed zero to a fixed top.

Textual's own sparkline rescales itself, so that a constant 98 % looks like 0 %, and fails on NaN. Here the
scale is given and shown, a column without a sample is empty, and a NaN is marked.
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
    """One quantity over the axis that all strips share."""

    name: str
    value: str
    """The last one, as text."""
    scale: str
    """The range of the chart: ``0…2e-4``."""
    trace: Envelope
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
        self._strips_shown: tuple[SparklineData, ...] = ()
        self._x = Axis(0, 1)

    def show(self, strips: tuple[SparklineData, ...], x: Axis) -> None:
        """Draw these; repaints nothing where it looks the same."""
        if (strips, x) != (self._strips_shown, self._x):
            self._strips_shown, self._x = strips, x
            self.redraw()

    def draw(self, width: int, height: int) -> list[Content]:
        strips = self._strips_shown
        if not strips:
            return []
        if height < len(strips):
            return [self._in_one_line(strips, width)]
        names = max(len(s.name) for s in strips)
        values = max(len(s.value) for s in strips)
        scales = max(len(s.scale) for s in strips)
        lines: list[Content] = []
        for strip in strips:
            head = Content.assemble(
                (f"{strip.name:<{names}} ", "dim"),
                f"{strip.value:>{values}} ",
                (f"{strip.scale:>{scales}} ", "dim"),
            )
            rows = self._rows(strip, width - head.cell_length, height // len(strips))
            lines += [head + rows[0], *(Content(" " * head.cell_length) + row for row in rows[1:])]
        return lines

    def _in_one_line(self, strips: tuple[SparklineData, ...], width: int) -> Content:
        width_left = (width - 2 * (len(strips) - 1)) // len(strips)
        parts = []
        for strip in strips:
            head = Content.assemble((f"{strip.name} ", "dim"), f"{strip.value} ")
            parts.append(head + self._rows(strip, max(0, width_left - head.cell_length), 1)[0])
        return Content("  ").join(parts)

    def _rows(self, strip: SparklineData, width: int, height: int) -> list[Content]:
        values = over_axis(strip.trace, self._x, width)
        return [Content.styled(row, strip.style) for row in blocks(values, 0.0, strip.top, height)]
