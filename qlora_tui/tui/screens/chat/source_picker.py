"""Selects a run with an adapter or checkpoints, or the recipe's model without an adapter."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.status import read_status
from qlora_tui.tui.screens.modals.list_picker import ListPicker

BASE_ALONE = "base"


def chat_runs() -> list[RunDir]:
    """Every run that has an adapter or a checkpoint, newest first."""
    return [
        run for run in all_runs() if (run.adapter_dir / "adapter_config.json").exists() or run.checkpoints()
    ]


class ChatSourceScreen(ListPicker[RunDir | str]):
    """Returns the chosen run, ``BASE_ALONE`` for the recipe's model, None when closed with Escape."""

    HEADING = "Chat with"
    ENTER = "select"

    def __init__(self, runs: list[RunDir], model: str) -> None:
        super().__init__()
        self._runs = {run.id: run for run in runs}
        self._model = model

    def lines(self) -> list[tuple[str, Content]]:
        lines = [(run.id, _line(run)) for run in self._runs.values()]
        if self._model:
            name = self._model.rstrip("/").rpartition("/")[2]
            lines.append(
                (BASE_ALONE, Content.assemble(name, ("  the recipe's model, without an adapter", "dim")))
            )
        return lines

    def picked(self, id_: str) -> RunDir | str:
        return self._runs.get(id_, id_)


def _line(run: RunDir) -> Content:
    status = read_status(run)
    loss = f", loss {status.loss:.3g}" if status.loss is not None else ""
    checkpoints = len(run.checkpoints())
    more = f", {checkpoints} checkpoint{'s' if checkpoints != 1 else ''}" if checkpoints else ""
    return Content.assemble(
        (run.name, "bold"), (f"\n  {status.state} at step {status.step:,}{loss}{more}", "dim")
    )
