"""Selects a run to watch: the active one, queued ones, and the last ones that ended."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content

from qlora_tui.formatting import truncate_middle
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.status import read_status
from qlora_tui.tui.render.labels import SIGNS
from qlora_tui.tui.screens.modals.list_picker import ListPicker

_NAME_WIDTH = 38
"""Cells of a name; together with state and steps as wide as the dialog."""
_MAX_LISTED = 30
"""Number of runs listed; the Runs screen lists all."""


class RunPickerScreen(ListPicker[RunDir]):
    """Returns the selected run; None when closed with Escape."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("q", "dismiss(None)", show=False)]
    HEADING = "Watch another run"
    ENTER = "watch"
    EMPTY = "There are no other runs."

    def __init__(self, now: RunDir | None) -> None:
        super().__init__()
        self._runs = {run.id: run for run in [run for run in all_runs() if run != now][:_MAX_LISTED]}

    def lines(self) -> list[tuple[str, Content]]:
        return [(id_, _line(run)) for id_, run in self._runs.items()]

    def picked(self, id_: str) -> RunDir:
        return self._runs[id_]


def _line(run: RunDir) -> Content:
    status = read_status(run)
    sign, style = SIGNS[status.state]
    steps = f"  {status.step:,}/{status.total_steps:,}" if status.total_steps else ""
    return Content.assemble(
        (f"{sign} {status.state:<10} ", style), truncate_middle(run.name, _NAME_WIDTH), (steps, "dim")
    )
