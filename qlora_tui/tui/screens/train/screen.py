"""Train: prepare and launch a run, or watch one. Each half is a separate pane."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from textual import work
from textual.widget import Widget

from qlora_tui.data.sources import every_source, source_stamps
from qlora_tui.errors import UserError
from qlora_tui.memory.budget import MemoryBudget, budget_for
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.preflight import preflight
from qlora_tui.runs.status import ACTIVE, RESUMABLE, State
from qlora_tui.tui.draft import draft_written_at
from qlora_tui.tui.screens.train.actions import TrainActions
from qlora_tui.tui.screens.train.launch_pane import LaunchPane, first_fix, launch
from qlora_tui.tui.screens.train.live_pane import LivePane
from qlora_tui.tui.screens.train.run_charts import zoom_start
from qlora_tui.tui.screens.train.run_follower import RunFollower
from qlora_tui.tui.screens.train.settings_form import SettingsForm
from qlora_tui.tui.system_status import SystemStatus

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

RUN_POLL_INTERVAL_S = 1.0
_PREPARING = frozenset(("launch", "recheck", "watch_another", "next_tab"))
"""Actions available while a run is prepared; all others need a run to watch."""
_PREPARING_ONLY = frozenset(("launch", "recheck"))
_STATES: Mapping[str, Collection[State]] = {
    "pause": ACTIVE,
    "request": ACTIVE,
    "learning_rate": ACTIVE,
    "stop": (*ACTIVE, "queued"),
    "resume": RESUMABLE,
    "chat": ("finished", "stopped", "paused"),
    "answers": ("finished", "stopped"),
}
"""States of the watched run that an action needs; one not listed is available in every state."""


class TrainScreen(TrainActions):
    """The recipe with its checks, or a run being watched."""

    MODE = "train"
    CSS_PATH = "train.tcss"
    EDITS_RECIPE = True
    HELP_TEXT = (
        "Before a run: what to press now, the whole recipe, and its checks. Enter edits a setting, [h] and "
        "[l] step it, Backspace resets it to the preset's value, ['] labels each setting with a letter to "
        "jump to. {train.tab} goes to the checks, and back. They find out whether the weights are on this "
        "machine, every row can be trained on, the settings make sense together, one training step fits in "
        "memory, the disk has room for checkpoints, and whether other runs come first.\n"
        "Until the first step: the stages of the start. 'testing' compares the first step with transformers "
        "and peft, then tries memory with one step on the longest batch.\n"
        "During a run: the training loss (gray) and its running mean (smoothed), ◆ evaluations (validation "
        "loss), ★ the best, "
        "× steps where the loss was not a number. exact is the share of short answers that are right to the "
        "last token, beside that of the base model. Below, on the same steps: learning rate, gradient norm "
        "and tokens per second, each from zero to its highest value; the number beside it is the latest. "
        "▲ under the memory bar is the estimate. The time in steps is that of all steps; evaluations and "
        "checkpoints take the rest of the time since the start. The run continues when you leave the app.\n"
        "An attempt is one process of the run: a resume, or a retry after memory ran out, starts another. "
        "Requests to a run have upper-case keys: the lower-case letters of vi scroll the log."
    )

    def __init__(self) -> None:
        super().__init__()
        self._follower: RunFollower | None = None
        self._polling = False
        self._is_pinned = False
        """Whether what is shown stays: the user chose it, or it is the run that became active."""
        self._ended_at: float | None = None
        """When the last run ended, where that is shown because nothing else was chosen."""
        self._checks_key: object = None
        self._stamps: object = None
        """State of the data files when the screen was last shown or the recipe changed."""

    def compose_body(self) -> Iterable[Widget]:
        yield LaunchPane()
        yield LivePane()

    def on_mount(self) -> None:
        self.set_interval(RUN_POLL_INTERVAL_S, self.poll_now)
        self._show_pane()

    def on_screen_resume(self) -> None:
        if self.run is not None and not self.run.path.exists():
            self.notify(f"{self.run.id} was deleted.")
            self._stop_watching()
        self.poll_now()

    @property
    def run(self) -> RunDir | None:
        """The run being watched; None while one is prepared."""
        return self._follower.run if self._follower else None

    def attach(self, run: RunDir) -> None:
        """Watch a run."""
        self._is_pinned, self._ended_at = True, None
        if self.run != run:
            self._follow(run)

    def _follow(self, run: RunDir) -> None:
        self._follower, self.snapshot, self.zoom = RunFollower(run), None, 0
        self._show_pane()
        self.poll_now()

    def show_recipe(self, recipe: Recipe) -> None:
        if self._ended_at is not None and draft_written_at() > self._ended_at:
            # Whoever edits the recipe is about to launch it.
            self._stop_watching()
        self.query_one(LaunchPane).show_recipe(recipe, self.qlora_app.workbench.preset_recipe)
        self._stamps = [source_stamps(source) for source in every_source(recipe.data)]
        self._check()

    def show_system_status(self, system_status: SystemStatus) -> None:
        if not self._is_pinned:
            if system_status.active is not None:
                self.attach(system_status.active)
            elif self.run is None:
                self._show_last(system_status)
        self._check()

    def _show_last(self, system_status: SystemStatus) -> None:
        """Show how the last run ended, unless the recipe was edited since."""
        run, status = system_status.active_or_last, system_status.active_or_last_status
        if run is None or status is None or status.state not in ("finished", *RESUMABLE):
            return
        if status.at and status.at >= draft_written_at():
            self._ended_at = status.at
            self._follow(run)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "fix" and self.run is None:
            return first_fix(self.checks) is not None
        if action == "fix":
            return self.snapshot is not None and self.snapshot.fix is not None
        if action == "chat" and self.state in ("stopped", "paused") and self.snapshot is not None:
            return bool(self.snapshot.view.checkpoints)
        if self.run is None:
            is_own = any(action == command.action.partition("(")[0] for command in self.SCREEN_COMMANDS)
            return action in _PREPARING or not is_own
        if action in _PREPARING_ONLY:
            return False
        return action not in _STATES or self.state in _STATES[action]

    def on_settings_form_edited(self, event: SettingsForm.Edited) -> None:
        """Change the recipe."""
        self.qlora_app.edit(event.path, event.value)

    def prepare(self) -> None:
        self._stop_watching()
        self._is_pinned = True
        self.show_recipe(self.qlora_app.workbench.recipe)

    def check_again(self) -> None:
        self._checks_key = None
        self.show_recipe(self.qlora_app.workbench.recipe)

    def _stop_watching(self) -> None:
        """Watch no run until one becomes active."""
        self._follower = self.snapshot = self._ended_at = None
        self._is_pinned = False
        self._show_pane()

    def _show_pane(self) -> None:
        self.set_class(self.run is not None, "-live")
        if self.run is None:
            self.query_one(SettingsForm).focus()
        else:
            self.query_one(LivePane).begin()
        self.refresh_bindings()

    def poll_now(self) -> None:
        if self._follower is not None and not self._polling and self.is_current:
            self._polling = True
            self._poll(self._follower)

    @work(group="poll")
    async def _poll(self, follower: RunFollower) -> None:
        step = self.snapshot.step if self.snapshot else 0
        follower.from_step = zoom_start(step, self.zoom)
        try:
            snapshot = await asyncio.to_thread(follower.poll)
        finally:
            self._polling = False
        if follower is not self._follower:
            self.poll_now()
            return
        before = (self.state, self.snapshot.fix if self.snapshot else None)
        self.snapshot = snapshot
        active = self.qlora_app.system_status.active
        another = active.id if active is not None and active != follower.run else ""
        answers = self.progress_of(follower.run.id)
        self.query_one(LivePane).show(snapshot, follower.from_step, another, answers)
        if (snapshot.status.state, snapshot.fix) != before:
            self.refresh_bindings()

    @property
    def _budget(self) -> MemoryBudget:
        """Memory of this machine, where the run would start, whichever GPU the estimates assume."""
        return budget_for(self.qlora_app.system_status.gpu)

    def _check(self) -> None:
        """Run the checks again, if anything they depend on has changed."""
        if self.run is not None:
            return
        system_status, recipe = self.qlora_app.system_status, self.qlora_app.workbench.recipe
        free = system_status.free_bytes
        key = (
            recipe,
            self._stamps,
            self._budget,
            system_status.active,
            system_status.waiting_ids,
            system_status.no_gpu,
            None if free is None else free >> 28,
        )
        if key != self._checks_key:
            self._checks_key = key
            self._start_checks(recipe, system_status)

    @work(exclusive=True, group="checks")
    async def _start_checks(self, recipe: Recipe, system_status: SystemStatus) -> None:
        await self._run_checks(recipe, system_status)

    async def _run_checks(self, recipe: Recipe, system_status: SystemStatus) -> None:
        self.checks = await asyncio.to_thread(
            preflight, recipe, system_status.machine(self._budget), read_columnar=False
        )
        self.query_one(LaunchPane).show_checks(self.checks, recipe)
        self.refresh_bindings()

    @work(exclusive=True, group="launch")
    async def launch_recipe(self) -> None:
        await self._run_checks(self.qlora_app.workbench.recipe, self.qlora_app.system_status)
        try:
            run = await launch(self.qlora_app, self.checks)
        except UserError as problem:
            self.qlora_app.show_error(problem)
            return
        if run is not None:
            self.attach(run)


async def show_run(app: QloraApp, run: RunDir) -> None:
    """Go to the Train screen and watch a run there."""
    await app.switch_mode("train")
    if isinstance(app.screen, TrainScreen):
        app.screen.attach(run)


async def prepare_run(app: QloraApp) -> None:
    """Go to the Train screen and prepare a run there."""
    await app.switch_mode("train")
    if isinstance(app.screen, TrainScreen):
        app.screen.prepare()
