"""The list of earlier runs on Home."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.content import Content

from qlora_tui.tui.widgets.line_widgets import DiffWidget

if TYPE_CHECKING:
    from qlora_tui.runs.run_summary import RunSummary


class RecentRuns(DiffWidget):
    """The runs before the last, as many as there is room for."""

    def __init__(self) -> None:
        super().__init__(id="recent-runs")
        self._summaries: tuple[RunSummary, ...] = ()
        self._now = 0.0

    def show(self, summaries: tuple[RunSummary, ...], now: float) -> None:
        """Show these; ``now`` is the Unix time that ages are counted to."""
        self._summaries, self._now = summaries, now
        self.redraw()

    def draw(self, width: int, height: int) -> list[Content]:
        if not self._summaries:
            return []
        from qlora_tui.tui.screens.home.text import recent_lines  # not needed for the first frame

        return recent_lines(list(self._summaries[:height]), self._now, width)
