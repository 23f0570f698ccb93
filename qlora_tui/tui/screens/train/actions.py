"""What the keys of the Train screen do with the recipe, the watched run, and the log."""

from __future__ import annotations

import shlex
from abc import abstractmethod
from collections.abc import Callable, Collection
from functools import partial

from qlora_tui.formatting import capitalize
from qlora_tui.runs import actions as run_actions
from qlora_tui.runs import control
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import STEP_PHASES
from qlora_tui.runs.machine_checks import Check
from qlora_tui.runs.status import ACTIVE, State, read_status
from qlora_tui.runs.suggested_fix import SuggestedFix
from qlora_tui.tui.folders import open_folder
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.leaving import leave
from qlora_tui.tui.screens.answer_measuring import EvaluationActions
from qlora_tui.tui.screens.modals.dialogs import ConfirmScreen, TextPromptScreen, ask_search
from qlora_tui.tui.screens.train.launch_pane import first_fix
from qlora_tui.tui.screens.train.live_pane import LivePane
from qlora_tui.tui.screens.train.run_picker import RunPickerScreen
from qlora_tui.tui.screens.train.run_snapshot import RunSnapshot

_MAX_ZOOM = 6
_REQUEST_NOTICES: dict[control.Kind, str] = {
    "checkpoint": "The run will save a checkpoint after this step.",
    "evaluate": "The run will measure the validation loss after this step.",
    "sample": "The run will answer the sample prompts after this step.",
    "finish_epoch": "The run will stop at the end of this epoch.",
}
"""Notification for each kind of request."""
_STOPPING_NOW = "The run stops now. It gives up the step in progress; the steps before it are saved."


class TrainActions(EvaluationActions):
    """A screen that watches a run, or prepares one."""

    ANSWERS_COMMAND = "train.answers"

    def __init__(self) -> None:
        super().__init__()
        self.checks: tuple[Check, ...] = ()
        """What the last checks of the recipe found."""
        self.snapshot: RunSnapshot | None = None
        """The watched run as it was last read."""
        self.zoom = 0
        """How many times the steps shown are halved."""

    @property
    @abstractmethod
    def run(self) -> RunDir | None:
        """The run being watched; None while one is prepared."""

    @property
    def state(self) -> State | None:
        """State of the run being watched."""
        return self.snapshot.status.state if self.snapshot else None

    @abstractmethod
    def attach(self, run: RunDir) -> None:
        """Watch a run."""

    @abstractmethod
    def prepare(self) -> None:
        """Show the recipe and its checks."""

    @abstractmethod
    def launch_recipe(self) -> object:
        """Check the recipe, launch or queue it, and watch the run."""

    @abstractmethod
    def check_again(self) -> None:
        """Run the checks, whether or not anything has changed."""

    @abstractmethod
    def poll_now(self) -> None:
        """Read the watched run, unless a read is in progress."""

    def action_answers(self) -> None:
        """Compare answers of the watched run's adapter and its base."""
        if self.run is not None:
            self.evaluate(self.run)

    def action_launch(self) -> None:
        """Launch or queue the recipe; failed checks are shown first."""
        self.launch_recipe()

    def action_recheck(self) -> None:
        """Run the checks again: a file may have changed."""
        self.check_again()
        self.notify("Checking again.")

    async def action_stop(self) -> None:
        """Ask, then stop the run after its step; where that was requested already, stop it now."""
        run = self.run
        if run is None:
            return
        if self.snapshot is not None and self.snapshot.is_stopping:
            self._act_on_run(partial(run_actions.stop, now=True), _STOPPING_NOW)
            return
        if self.state == "queued":
            self._act_on_run(
                run_actions.stop,
                f"Removed from the queue. Press {key_name('train.resume')} to queue it again.",
            )
        else:
            view = self.snapshot.view if self.snapshot else None
            if view is None or view.phase in STEP_PHASES:
                outcome = "will save a checkpoint and the adapter of this step, then stop. It can be resumed."
                snapshot = self.snapshot
                if snapshot is not None and snapshot.best is not None and snapshot.is_best_saved:
                    outcome += f" Its best checkpoint, of step {snapshot.best.step:,}, stays."
            elif view.checkpoints:
                outcome = (
                    "has not trained a step since it was resumed. It can be resumed from its last checkpoint."
                )
            else:
                outcome = (
                    "has not trained a step yet, so nothing is saved. If resumed, it starts from step 0."
                )
            after_step = " after this step" if view is None or view.phase in STEP_PHASES else ""
            self._confirm(
                "Stop the run?",
                f"{run.id} {outcome}",
                lambda: run_actions.stop(run),
                done=f"The run will stop{after_step}.",
                while_in=ACTIVE,
            )

    def action_pause(self) -> None:
        """Ask, then pause the run, so that it frees the GPU."""
        run = self.run
        if run is None:
            return
        resume = f"Press {key_name('train.resume')} to resume it."
        self._confirm(
            "Pause the run?",
            f"{run.id} will save a checkpoint after this step and free the GPU. {resume}",
            lambda: run_actions.pause(run),
            done="The run will pause after this step.",
            while_in=ACTIVE,
        )

    def action_resume(self) -> None:
        """Queue the run again."""
        has_checkpoint = self.snapshot is not None and bool(self.snapshot.view.checkpoints)
        origin = "resume from its last checkpoint" if has_checkpoint else "start from step 0"
        self._act_on_run(run_actions.resume, f"Queued. The run will {origin}.")

    def action_request(self, kind: control.Kind) -> None:
        """Send a request to the trainer."""
        self._act_on_run(lambda run: control.send_request(run, kind), _REQUEST_NOTICES[kind])

    def action_learning_rate(self) -> None:
        """Ask for a learning rate, and set it."""
        now = self.snapshot.learning_rate if self.snapshot else None
        self._prompt_for_rate("" if now is None else f"{now:.3g}")

    def _prompt_for_rate(self, proposed: str) -> None:
        def on_result(text: str | None) -> None:
            if text:
                self._act_on_run(
                    lambda run: control.send_request(run, "set_learning_rate", float(text)),
                    f"The learning rate will change to {float(text):g} after this step.",
                )

        self.app.push_screen(
            TextPromptScreen(
                "Learning rate",
                "The new peak. The schedule continues from it.",
                proposed,
                _rate_problem,
            ),
            on_result,
        )

    async def action_fix(self) -> None:
        """Apply the fix of the first check, or, after asking, that of the run's latest warning."""
        if self.run is None:
            self._fix_recipe()
            return
        fix = self.snapshot.fix if self.snapshot else None
        if fix is None:
            return
        if fix.rate is not None:
            self._prompt_for_rate(f"{fix.rate:g}")
        elif fix.stop:
            await self.action_stop()
        else:
            self._offer_next_run(self.run, fix)

    def _fix_recipe(self) -> None:
        fix = first_fix(self.checks)
        if fix is None:
            return
        workbench = self.qlora_app.workbench
        if workbench.replace(fix.apply_to(workbench.recipe)):
            self.qlora_app.recipe_edited()
            label = capitalize(fix.label)
            self.notify(f"{label}. Press {key_name('app.undo')} to undo.")

    def _offer_next_run(self, run: RunDir, fix: SuggestedFix) -> None:
        def on_result(yes: bool | None) -> None:
            if not yes:
                return
            if self.qlora_app.workbench.replace(fix.apply_to(run.recipe())):
                self.qlora_app.recipe_edited()
            self.action_prepare()

        text = f"This run's recipe replaces the one you are editing. Press {key_name('app.undo')} to undo."
        self.app.push_screen(ConfirmScreen(f"{capitalize(fix.label)}?", text), on_result)

    async def action_chat(self) -> None:
        """Open the Chat screen with the adapter."""
        from qlora_tui.tui.screens.chat.screen import show_chat

        if self.run is not None:
            await show_chat(self.qlora_app, self.run)

    def action_watch_another(self) -> None:
        """Choose a run to watch."""

        def on_result(run: RunDir | None) -> None:
            if run is not None:
                self.attach(run)

        self.app.push_screen(RunPickerScreen(self.run), on_result)

    def action_prepare(self) -> None:
        """Go back to the recipe and its checks."""
        self.prepare()

    def action_detach(self) -> None:
        """Leave the app; the farewell names the command that comes back to the run."""
        leave(self.qlora_app, self.run)

    def action_next_tab(self, places: int) -> None:
        """Show the next tab under the graph; before a run, go between recipe and checks."""
        if self.run is not None:
            self.query_one(LivePane).next_tab(places)
        elif places > 0:
            self.focus_next()
        else:
            self.focus_previous()

    def action_show_tab(self, name: str) -> None:
        """Show a tab by its name."""
        self.query_one(LivePane).show_tab(name)

    def action_zoom(self, direction: int) -> None:
        """Zoom in to the last half of the steps (1), or out (-1)."""
        self.zoom = min(max(self.zoom + direction, 0), _MAX_ZOOM)
        self.poll_now()

    def action_level(self) -> None:
        """Show all levels, warnings only, or errors only."""
        self.query_one(LivePane).next_level()

    def action_search(self) -> None:
        """Ask for a text that log lines must contain."""
        pane = self.query_one(LivePane)
        ask_search(self.app, "lines", pane.search, pane.search_for)

    def action_folder(self) -> None:
        """Open the folder of the run, or copy the command that goes there."""
        if self.run is not None:
            open_folder(self.qlora_app, self.run.path)

    def action_copy_command(self) -> None:
        """Copy the command that shows this run."""
        if self.run is not None:
            command = f"qlora-tui attach {shlex.quote(self.run.id)}"
            self.app.copy_to_clipboard(command)

    def _confirm(
        self, title: str, text: str, act: Callable[[], None], done: str = "", *, while_in: Collection[str]
    ) -> None:
        """Ask, then act. ``while_in``: in any other state of the run the question is closed."""
        run = self.run
        if run is None:
            return

        def on_result(yes: bool | None) -> None:
            if yes:
                self._act_on_run(lambda run: act(), done)

        self.app.push_screen(
            ConfirmScreen(title, text, is_outdated=lambda: read_status(run).state not in while_in), on_result
        )

    def _act_on_run(self, act: Callable[[RunDir], None], done: str) -> None:
        run = self.run
        if run is None or not self.qlora_app.try_or_show_error(lambda: act(run)):
            return
        if done:
            self.notify(done)
        self.poll_now()


def _rate_problem(text: str) -> str:
    """Return what is wrong with a typed learning rate, or an empty string."""
    try:
        rate = float(text)
    except ValueError:
        return "Enter a number, such as 1e-4."
    return "" if 0 < rate <= 1 else "It must be above 0 and at most 1."
