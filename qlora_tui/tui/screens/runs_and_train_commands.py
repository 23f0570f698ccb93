"""The commands that the Runs screen and the Train screen share. Each command acts on one run. Commands that
only Runs has, such as renaming and deleting a run, are in ``runs/screen``.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.content import Content
from textual.widgets import Static

from qlora_tui.errors import UserError
from qlora_tui.formatting import format_path, format_progress
from qlora_tui.runs import actions as run_actions
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.task_metrics.task_evaluation import (
    TaskEvaluation,
    evaluate_task,
    read_task_evaluation,
    report_lines,
)
from qlora_tui.tui.desktop import open_folder
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.modals.dialogs import TextDialog, TextPromptScreen
from qlora_tui.tui.screens.runs.export_dialog import show_export_dialog
from qlora_tui.tui.threads import Measurement
from qlora_tui.visible import visible

_ROWS_SHOWN = 100
_WIDE_COLUMNS = 110
"""Minimum width of the terminal, in columns, at which the table of answers fits into a dialog."""


class RunCommands(WorkScreen):
    """A screen with commands for one run: chat, export, answers, run card, folder, and position
    in the queue.
    """

    ANSWERS_COMMAND: ClassVar[str]
    """Id of the screen's command that compares the run's answers with the base model's, or stops a comparison
    that is in progress.
    """

    def __init__(self) -> None:
        super().__init__()
        self._measurement = Measurement()
        self._measured_id = ""
        """Id of the run that is being measured, or that was measured last."""

    @property
    def target_run(self) -> RunDir:
        """The run that the commands act on. Raises SkipAction if there is none."""
        raise NotImplementedError

    def act_on_target(self, act: Callable[[RunDir], None], done: str) -> None:
        """Call ``act`` with the run that the commands act on, and show ``done`` as a notification."""
        raise NotImplementedError

    async def action_chat(self) -> None:
        from qlora_tui.tui.screens.chat.screen import show_chat

        await show_chat(self.app, self.target_run)

    def action_export(self) -> None:
        show_export_dialog(self.app, self.target_run)

    def action_folder(self) -> None:
        open_folder(self.app, self.target_run.path)

    def action_copy(self, verb: str) -> None:
        """Copy a ``qlora-tui`` command for a terminal: ``attach`` with the run's id, or another ``verb``,
        such as ``train``, with the path of the run's recipe.
        """
        run = self.target_run
        words = run.id if verb == "attach" else str(run.recipe_path)
        self.app.copy_to_clipboard(f"qlora-tui {verb} {shlex.quote(words)}")

    def action_withdraw(self) -> None:
        key = key_name(f"{self.MODE}.resume")
        self.act_on_target(run_actions.stop, f"Removed from the queue. Press {key} to queue it again.")

    def action_now(self) -> None:
        done = (
            "The run will train to its end, even outside the training hours and while other programs use the "
            "GPU."
        )
        self.act_on_target(run_actions.train_now, done)

    def action_answers(self) -> None:
        self.evaluate(self.target_run)

    def evaluate(self, run: RunDir) -> None:
        """If a measurement is in progress, stop it. Otherwise, show how the base model and the run's adapter
        answer the validation prompts. If these answers have not been measured yet, measure them first.
        """
        if not self._measurement.stop():
            self._evaluate(run)

    def progress_of(self, run_id: str) -> str:
        """Return the progress of measuring this run's answers; empty if they are not being measured."""
        return self._measurement.progress if run_id == self._measured_id else ""

    def action_card(self) -> None:
        """Ask where to save the run card (a picture of the run and its results), and save it."""
        run = self.target_run
        text = (
            "A picture to share: model, data, curve, loss, one question answered before and after "
            "training, speed and memory. The file's name must end in .svg or .png."
        )
        prompt = TextPromptScreen("Save the run card", text, format_path(Path.cwd() / f"{run.id}.svg"))
        self.ask(prompt, lambda typed: self._save_card(run, Path(typed).expanduser()))

    @work(exclusive=True, group="card")
    async def _save_card(self, run: RunDir, file: Path) -> None:
        card = await asyncio.to_thread(import_module, "qlora_tui.tui.render.run_card")
        await asyncio.to_thread(card.save_card, run, file)
        self.notify(f"Saved the run card as {format_path(file)}.")

    # Exclusive, so that pressing the key twice does not start two measurements.
    @work(exclusive=True, group="evaluation")
    async def _evaluate(self, run: RunDir) -> None:
        evaluation = await asyncio.to_thread(read_task_evaluation, run)
        if evaluation is None:
            evaluation = await self._measure(run)
        if evaluation is not None:
            narrow = self.app.size.width < _WIDE_COLUMNS
            lines = map(visible, report_lines(evaluation, _ROWS_SHOWN, narrow=narrow))
            report = Static(Content("\n".join(lines)))
            self.app.push_screen(TextDialog[None]("Answers of adapter and base", report, is_wide=True))

    async def _measure(self, run: RunDir) -> TaskEvaluation | None:
        self._measured_id = run.id
        self.notify(
            f"Base and adapter of {run.name} answer its validation prompts. "
            f"Press {key_name(self.ANSWERS_COMMAND)} to stop and keep the answers so far."
        )

        def measure(say: Callable[[str], None], should_stop: Callable[[], bool]) -> TaskEvaluation:
            def on_progress(done: int, total: int) -> None:
                say(format_progress(done, total))

            return evaluate_task(run, progress=on_progress, should_stop=should_stop)

        try:
            evaluation = await self._measurement.run(measure, "loading the model")
        except UserError as problem:
            self.app.notify_error(problem)
            return None
        if evaluation is None:
            self.notify(f"Stopped. Press {key_name(self.ANSWERS_COMMAND)} to continue.")
        return evaluation
