"""The keys of Runs and Train that compare answers of a run's adapter and its base."""

from __future__ import annotations

import asyncio
from threading import Event
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from qlora_tui.errors import UserError
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.task_metrics.task_evaluation import (
    TaskEvaluation,
    evaluate_task,
    read_task_evaluation,
    report_lines,
)
from qlora_tui.tui.key_names import dialog_keys, key_name
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.widgets.controls import ViScroll
from qlora_tui.visible import visible
from qlora_tui.worker import JobStopped

_ROWS_SHOWN = 100
_WIDE_COLUMNS = 110
"""Columns of the terminal from which a dialog holds all columns of the table."""


class AnswersScreen(ModalScreen[None]):
    """The metrics of an evaluation, and every prompt with both answers."""

    CSS_PATH = "modals/modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "dismiss", "Close")]

    def __init__(self, evaluation: TaskEvaluation) -> None:
        super().__init__()
        self._evaluation = evaluation

    def compose(self) -> ComposeResult:
        with ViScroll(classes="dialog wide") as dialog:
            dialog.border_title = "Answers of adapter and base"
            dialog.border_subtitle = dialog_keys(self.BINDINGS)
            narrow = self.app.size.width < _WIDE_COLUMNS
            report = report_lines(self._evaluation, _ROWS_SHOWN, narrow=narrow)
            lines = (visible(line) for line in report)
            yield Static(Content("\n".join(lines)))

    def on_mount(self) -> None:
        self.query_one(ViScroll).focus()


class EvaluationActions(WorkScreen):
    """A screen with a run whose answers can be measured, one run at a time."""

    ANSWERS_COMMAND: ClassVar[str]
    """Id of the command that measures, whose key also stops."""
    answers_progress: tuple[str, str] | None = None
    """Id of the run that is measured, and how far that is; None while none is."""
    _stop: Event | None = None
    """Ends the measurement; None while there is none."""

    def evaluate(self, run: RunDir) -> None:
        """Show the answers of a run; measure them first where that was not done, or stop measuring."""
        if self._stop is not None:
            self._stop.set()
        else:
            self._evaluate(run)

    def progress_of(self, run_id: str) -> str:
        """How far the measurement of this run's answers is; empty while there is none."""
        measured_id, progress = self.answers_progress or ("", "")
        return progress if run_id == measured_id else ""

    # Exclusive: a second key while the stored evaluation is read starts no second measurement.
    @work(exclusive=True, group="evaluation")
    async def _evaluate(self, run: RunDir) -> None:
        evaluation = await asyncio.to_thread(read_task_evaluation, run)
        if evaluation is None:
            evaluation = await self._measure(run)
        if evaluation is not None:
            self.app.push_screen(AnswersScreen(evaluation))

    async def _measure(self, run: RunDir) -> TaskEvaluation | None:
        self._stop = stop = Event()
        self.answers_progress = run.id, "loading the model"
        self.notify(
            f"Base and adapter of {run.name} answer its validation prompts. "
            f"Press {key_name(self.ANSWERS_COMMAND)} to stop; the answers so far stay."
        )

        def on_progress(done: int, total: int) -> None:
            self.answers_progress = run.id, f"{done:,} of {total:,}"

        try:
            return await asyncio.to_thread(evaluate_task, run, progress=on_progress, should_stop=stop.is_set)
        except JobStopped:
            self.notify(f"Stopped. Press {key_name(self.ANSWERS_COMMAND)} to continue.")
        except UserError as problem:
            self.qlora_app.notify_error(problem)
        finally:
            # Leaving the app cancels this worker, but not its thread, for whose end the app would wait.
            stop.set()
            self._stop = self.answers_progress = None
        return None
