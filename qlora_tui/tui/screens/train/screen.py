"""Train: prepare and launch a run, or watch one. Each half is a separate pane."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.widget import Widget

from qlora_tui.data.sources import every_source, source_stamps
from qlora_tui.errors import UserError
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions, control
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.machine_checks import Check
from qlora_tui.runs.preflight import preflight
from qlora_tui.runs.status import ACTIVE, State, read_status
from qlora_tui.runs.suggested_fix import SuggestedFix
from qlora_tui.tui.commands import Command
from qlora_tui.tui.render.key_names import key_name
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.modals.confirm import ConfirmScreen
from qlora_tui.tui.screens.modals.text_prompt import TextPromptScreen
from qlora_tui.tui.screens.train.commands import (
    ACTION_NAMES,
    COMMANDS,
    REQUEST_NOTICES,
    is_available,
    validate_rate,
)
from qlora_tui.tui.screens.train.launch_pane import LaunchPane, launch
from qlora_tui.tui.screens.train.live_pane import LivePane
from qlora_tui.tui.screens.train.loss_plot import zoom_start
from qlora_tui.tui.screens.train.run_follower import RunFollower, RunSnapshot
from qlora_tui.tui.screens.train.run_picker import RunPickerScreen
from qlora_tui.tui.screens.train.settings_form import SettingsForm
from qlora_tui.tui.system_status import SystemStatus

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

RUN_POLL_INTERVAL_S = 1.0
_MAX_ZOOM = 6


class TrainScreen(WorkScreen):
    """Prepares, launches, watches."""

    MODE = "train"
    CSS_PATH = "train.tcss"
    EDITS_RECIPE = True
    HELP_TEXT = (
        "Before a run: the whole recipe and its checks. Enter edits a setting, [h] and [l] step it, "
        "Backspace resets it to the preset's value, ['] labels each setting with a letter to jump to.\n"
        "During a run: the loss (gray) with its running mean, ◆ validations, ★ the best validation, × "
        "steps where the loss was not a number. Each small chart goes from zero to the number beside it. "
        "▲ under the memory bar is the estimate. The run continues when you leave the app."
    )
    SCREEN_COMMANDS: ClassVar[tuple[Command, ...]] = COMMANDS

    def __init__(self) -> None:
        super().__init__()
        self._follower: RunFollower | None = None
        self._snapshot: RunSnapshot | None = None
        self._polling = False
        self._zoom = 0
        self._chosen = False
        """Whether the user chose what to show; until then it is the active run."""
        self._checks: tuple[Check, ...] = ()
        self._checks_key: object = None
        self._stamps: object = None
        """State of the data files when the screen was last shown or the recipe changed."""

    def compose_body(self) -> Iterable[Widget]:
        yield LaunchPane()
        yield LivePane()

    def on_mount(self) -> None:
        self.set_interval(RUN_POLL_INTERVAL_S, self._start_poll)
        self._show_pane()

    def on_screen_resume(self) -> None:
        if self.run is not None and not self.run.path.exists():
            self.notify(f"{self.run.id} was deleted.")
            self._stop_watching()
        self._start_poll()

    @property
    def run(self) -> RunDir | None:
        """The run being watched; None while one is prepared."""
        return self._follower.run if self._follower else None

    @property
    def state(self) -> State | None:
        """State of the run being watched."""
        return self._snapshot.status.state if self._snapshot else None

    def attach(self, run: RunDir) -> None:
        """Watch a run."""
        self._chosen = True
        if self.run == run:
            return
        self._follower, self._snapshot, self._zoom = RunFollower(run), None, 0
        self._show_pane()
        self._start_poll()

    def show_recipe(self, recipe: Recipe) -> None:
        self.query_one(LaunchPane).show_recipe(recipe, self.qlora_app.workbench.base)
        self._stamps = [source_stamps(source) for source in every_source(recipe.data)]
        self._check()

    def show_system_status(self, system_status: SystemStatus) -> None:
        if not self._chosen and self.run is None and system_status.active is not None:
            self.attach(system_status.active)
        self._check()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "fix":
            return self._snapshot is not None and self._snapshot.fix is not None
        if action in ACTION_NAMES:
            return is_available(action, self.run is not None, self.state)
        return super().check_action(action, parameters)

    def action_launch(self) -> None:
        """Launch or queue the recipe; failed checks are shown first."""
        self._launch()

    def action_recheck(self) -> None:
        """Check again: a file may have changed."""
        self._checks_key = None
        self.show_recipe(self.qlora_app.workbench.recipe)
        self.notify("Checking again.")

    async def action_stop(self) -> None:
        """Ask, then stop the run."""
        run = self.run
        if run is None:
            return
        if self.state == "queued":
            self._confirm("Remove from the queue?", f"{run.id} has not started.", lambda: actions.stop(run))
        else:
            self._confirm(
                "Stop the run?",
                f"{run.id} will save a checkpoint and its adapter, then stop. It can be resumed.",
                lambda: actions.stop(run),
                done="The run will stop after this step.",
            )

    def action_pause(self) -> None:
        """Pause the run, so that it frees the GPU."""
        self._act_on_run(lambda run: actions.pause(run), "The run will pause after this step.")

    def action_resume(self) -> None:
        """Queue the run again."""
        self._act_on_run(actions.resume, "Queued. The run will resume from its last checkpoint.")

    def action_request(self, kind: control.Kind) -> None:
        """Leave a request for the trainer."""
        self._act_on_run(lambda run: control.send_request(run, kind), REQUEST_NOTICES[kind])

    def action_learning_rate(self) -> None:
        """Ask for a learning rate, and set it."""
        now = self._snapshot.last[0] if self._snapshot else None
        self._prompt_for_rate("" if now is None else f"{now:.3g}")

    def _prompt_for_rate(self, proposed: str) -> None:
        def take(text: str | None) -> None:
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
                validate_rate,
            ),
            take,
        )

    async def action_fix(self) -> None:
        """Apply the suggested fix, after asking."""
        fix = self._snapshot.fix if self._snapshot else None
        if fix is None or self.run is None:
            return
        if fix.rate is not None:
            self._prompt_for_rate(f"{fix.rate:g}")
        elif fix.stop:
            await self.action_stop()
        else:
            self._offer_next_run(self.run, fix)

    def _offer_next_run(self, run: RunDir, fix: SuggestedFix) -> None:
        def take(yes: bool | None) -> None:
            if not yes:
                return
            recipe = run.recipe()
            for path, value in fix.changes.items():
                recipe = replace_setting(recipe, path, value)
            if self.qlora_app.workbench.replace(recipe):
                self.qlora_app.recipe_edited()
            self.action_prepare()

        text = f"This run's recipe replaces the one you are editing. Press {key_name('app.undo')} to undo."
        self.app.push_screen(ConfirmScreen(f"{fix.label[:1].upper()}{fix.label[1:]}?", text), take)

    async def action_chat(self) -> None:
        """Talk to the adapter."""
        from qlora_tui.tui.screens.chat.screen import show_chat

        if self.run is not None:
            await show_chat(self.qlora_app, self.run)

    def action_watch_another(self) -> None:
        """Choose a run to watch."""

        def take(run: RunDir | None) -> None:
            if run is not None:
                self.attach(run)

        self.app.push_screen(RunPickerScreen(self.run), take)

    def action_prepare(self) -> None:
        """Back to the recipe and its checks."""
        self._stop_watching()
        self._chosen = True
        self.show_recipe(self.qlora_app.workbench.recipe)

    def action_detach(self) -> None:
        """Leave the app."""
        run = self.run
        if run is None:
            return

        state = read_status(run).state
        stands = "continues" if state in ACTIVE else f"is {state}"
        text = f"{run.id} {stands}. Run `qlora-tui attach {run.id}` to watch it again."

        def take(yes: bool | None) -> None:
            if yes:
                self.app.exit(message=text)

        self.app.push_screen(ConfirmScreen("Leave the app?", text, "Leave", harmless=True), take)

    def action_next_tab(self, places: int) -> None:
        """The next of the texts under the graph."""
        self.query_one(LivePane).next_tab(places)

    def action_show_tab(self, name: str) -> None:
        """One of the texts, by its name."""
        self.query_one(LivePane).show_tab(name)

    def action_zoom(self, direction: int) -> None:
        """Show the last half of the steps shown, or twice as many."""
        self._zoom = min(max(self._zoom + direction, 0), _MAX_ZOOM)
        self._start_poll()

    def action_level(self) -> None:
        """The next choice of levels."""
        self.query_one(LivePane).next_level()

    def action_search(self) -> None:
        """Ask for a text to search."""
        pane = self.query_one(LivePane)
        self.app.push_screen(
            TextPromptScreen(
                "Search", "Show only lines with this text. Leave empty to show all.", pane.search
            ),
            lambda text: None if text is None else pane.search_for(text),
        )

    def action_copy_command(self) -> None:
        """Copy the command that shows this run."""
        if self.run is not None:
            command = f"qlora-tui attach {shlex.quote(self.run.id)}"
            self.app.copy_to_clipboard(command)

    def on_settings_form_edited(self, event: SettingsForm.Edited) -> None:
        """Change the recipe."""
        self.qlora_app.edit(event.path, event.value)

    def _stop_watching(self) -> None:
        """Watch no run until one becomes active."""
        self._follower = self._snapshot = None
        self._chosen = False
        self._show_pane()

    def _show_pane(self) -> None:
        self.set_class(self.run is not None, "-live")
        if self.run is None:
            self.query_one(SettingsForm).focus()
        else:
            self.query_one(LivePane).begin()
        self.refresh_bindings()

    def _start_poll(self) -> None:
        if self._follower is not None and not self._polling and self.is_current:
            self._polling = True
            self._poll(self._follower)

    @work(group="poll")
    async def _poll(self, follower: RunFollower) -> None:
        step = self._snapshot.step if self._snapshot else 0
        follower.from_step = zoom_start(step, self._zoom)
        try:
            snapshot = await asyncio.to_thread(follower.poll)
        finally:
            self._polling = False
        if follower is not self._follower:
            self._start_poll()
            return
        before = (self.state, self._snapshot.fix if self._snapshot else None)
        self._snapshot = snapshot
        self.query_one(LivePane).show(snapshot, follower.from_step)
        if (snapshot.status.state, snapshot.fix) != before:
            self.refresh_bindings()

    def _check(self) -> None:
        """Run the checks again, if anything they depend on has changed."""
        if self.run is not None:
            return
        system_status, recipe = self.qlora_app.system_status, self.qlora_app.workbench.recipe
        free = system_status.free_bytes
        key = (
            recipe,
            self._stamps,
            self.qlora_app.memory_budget,
            system_status.active,
            system_status.waiting,
            system_status.no_gpu_reason,
            None if free is None else free >> 28,
        )
        if key != self._checks_key:
            self._checks_key = key
            self._start_checks(recipe, system_status)

    @work(exclusive=True, group="checks")
    async def _start_checks(self, recipe: Recipe, system_status: SystemStatus) -> None:
        await self._run_checks(recipe, system_status)

    async def _run_checks(self, recipe: Recipe, system_status: SystemStatus) -> None:
        self._checks = await asyncio.to_thread(
            preflight, recipe, system_status.machine(self.qlora_app.memory_budget), read_columnar=False
        )
        self.query_one(LaunchPane).show_checks(self._checks)

    @work(exclusive=True, group="launch")
    async def _launch(self) -> None:
        await self._run_checks(self.qlora_app.workbench.recipe, self.qlora_app.system_status)
        try:
            run = await launch(self.qlora_app, self._checks)
        except UserError as problem:
            self.qlora_app.show_error(problem)
            return
        if run is not None:
            self.attach(run)

    def _confirm(self, title: str, text: str, act: Callable[[], None], done: str = "") -> None:
        def take(yes: bool | None) -> None:
            if yes:
                self._act_on_run(lambda run: act(), done)

        self.app.push_screen(ConfirmScreen(title, text), take)

    def _act_on_run(self, act: Callable[[RunDir], None], done: str) -> None:
        run = self.run
        if run is None or not self.qlora_app.try_or_show_error(lambda: act(run)):
            return
        if done:
            self.notify(done)
        self._start_poll()


async def show_run(app: QloraApp, run: RunDir) -> None:
    """Go to the Train screen and watch a run there."""
    await app.switch_mode("train")
    if isinstance(app.screen, TrainScreen):
        app.screen.attach(run)


async def prepare_run(app: QloraApp) -> None:
    """Go to the Train screen and prepare a run there."""
    await app.switch_mode("train")
    if isinstance(app.screen, TrainScreen):
        app.screen.action_prepare()
