"""The widget around a :class:`~qlora_tui.tui.render.plot.Plot`."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.tui.render.axis import Axis
from qlora_tui.tui.render.plot import Plot, plot
from qlora_tui.tui.widgets.diff_widget import DiffWidget


class Graph(DiffWidget):
    """Shows a :class:`Plot`."""

    DEFAULT_CSS = """
    Graph {
        height: 1fr;
        min-height: 4;
    }
    """

    def __init__(self, empty: str = "", *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._plot = Plot(Axis(0, 1), Axis(0, 1), empty=empty)

    def show(self, what: Plot) -> None:
        """Draw this; repaints nothing where it looks the same."""
        if what != self._plot:
            self._plot = what
            self.redraw()

    def draw(self, width: int, height: int) -> list[Content]:
        return plot(self._plot, width, height)
