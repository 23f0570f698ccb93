"""Selects a run with an adapter or checkpoints, or the recipe's model without an adapter."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList

from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.status import read_status
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.widgets.vi_list import ViList

BASE_ALONE = "base"


def chat_runs() -> list[RunDir]:
    """Every run that has an adapter or a checkpoint, newest first."""
    return [
        run for run in all_runs() if (run.adapter_dir / "adapter_config.json").exists() or run.checkpoints()
    ]


class ChatSourceScreen(ModalScreen[RunDir | str | None]):
    """Returns the chosen run, ``BASE_ALONE`` for the recipe's model, None when closed with Escape."""

    CSS_PATH = "../modals/modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]

    def __init__(self, runs: list[RunDir], model: str) -> None:
        super().__init__()
        self._runs = {run.id: run for run in runs}
        self._model = model

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = "Chat with"
            dialog.border_subtitle = dialog_keys(self.BINDINGS, "Enter select")
            yield ViList()

    def on_mount(self) -> None:
        lines = [(run.id, _line(run)) for run in self._runs.values()]
        if self._model:
            name = self._model.rstrip("/").rpartition("/")[2]
            lines.append(
                (BASE_ALONE, Content.assemble(name, ("  the recipe's model, without an adapter", "dim")))
            )
        self.query_one(ViList).show(lines)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Choose it."""
        chosen = event.option_id or ""
        self.dismiss(self._runs.get(chosen, chosen))


def _line(run: RunDir) -> Content:
    status = read_status(run)
    loss = f", loss {status.loss:.3g}" if status.loss is not None else ""
    checkpoints = len(run.checkpoints())
    more = f", {checkpoints} checkpoint{'s' if checkpoints != 1 else ''}" if checkpoints else ""
    return Content.assemble(
        (run.name, "bold"), (f"\n  {status.state} at step {status.step:,}{loss}{more}", "dim")
    )
