"""Selects a run to watch: the active one, queued ones, and the last ones that ended."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static

from qlora_tui.formatting import truncate_middle
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.status import read_status
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.render.run_labels import SIGNS
from qlora_tui.tui.widgets.vi_list import ViList

_NAME_WIDTH = 38
"""Cells of a name; together with state and steps as wide as the dialog."""
_MAX_LISTED = 30
"""Number of runs listed; the Runs screen lists all."""


class RunPickerScreen(ModalScreen[RunDir | None]):
    """Returns the selected run; None when closed with Escape."""

    CSS_PATH = "../modals/modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "dismiss(None)", "Close"),
    ]

    def __init__(self, now: RunDir | None) -> None:
        super().__init__()
        self._runs = [run for run in all_runs() if run != now][:_MAX_LISTED]

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = "Watch another run"
            dialog.border_subtitle = dialog_keys(self.BINDINGS, "Enter watch")
            if self._runs:
                yield ViList()
            else:
                yield Static("There are no other runs.")

    def on_mount(self) -> None:
        for runs in self.query(ViList):
            runs.show([(run.id, _line(run)) for run in self._runs])

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._runs[event.option_index])


def _line(run: RunDir) -> Content:
    status = read_status(run)
    sign, style = SIGNS[status.state]
    steps = f"  {status.step:,}/{status.total_steps:,}" if status.total_steps else ""
    return Content.assemble(
        (f"{sign} {status.state:<10} ", style), truncate_middle(run.name, _NAME_WIDTH), (steps, "dim")
    )
