"""Choosing whom to talk to: a run with an adapter or checkpoints."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.status import read_status


def runs_to_talk_to() -> list[RunDir]:
    """Every run that has an adapter or a checkpoint, newest first."""
    return [
        run for run in all_runs() if (run.adapter_dir / "adapter_config.json").exists() or run.checkpoints()
    ]


class ChatSourceScreen(ModalScreen[RunDir]):
    """Gives the run chosen; None when closed with Escape."""

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close"),
        Binding("j", "move(1)", show=False),
        Binding("k", "move(-1)", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._runs = runs_to_talk_to()

    def compose(self) -> ComposeResult:
        with Vertical(classes="card") as card:
            card.border_title = "Talk to"
            card.border_subtitle = "enter chooses · esc closes"
            yield OptionList(*(Option(_line(run)) for run in self._runs))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Choose it."""
        self.dismiss(self._runs[event.option_index])

    def action_move(self, by: int) -> None:
        """As the arrows do."""
        options = self.query_one(OptionList)
        options.action_cursor_down() if by > 0 else options.action_cursor_up()


def _line(run: RunDir) -> Content:
    status = read_status(run)
    return Content.assemble(run.id, (f"  {status.state}, step {status.step:,}", "dim"))
