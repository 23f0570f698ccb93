"""The Train screen, with a pane for preparing and launching a run, and a pane for watching a run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from textual import work
from textual.actions import SkipAction
from textual.content import Content
from textual.widget import Widget

from qlora_tui.data.sources import every_source, source_stamps
from qlora_tui.errors import UserError
from qlora_tui.formatting import capitalize, format_progress, format_rate, truncate_middle
from qlora_tui.recipe.fields import replace_settings
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions as run_actions
from qlora_tui.runs import control
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.doctor import Check, Machine
from qlora_tui.runs.events import STEP_PHASES
from qlora_tui.runs.expected_time import Forecast, forecast, measured_forecast
from qlora_tui.runs.preflight import EXACT_WITHIN_S, errors, preflight, with_count
from qlora_tui.runs.status import ACTIVE, RESUMABLE, State, read_status
from qlora_tui.runs.step_probe import StepProbe, probe_steps, progress_words
from qlora_tui.runs.suggested_fix import SuggestedFix
from qlora_tui.tui.draft import draft_written_at
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.labels import SIGNS
from qlora_tui.tui.screens.modals.dialogs import (
    Choice,
    ConfirmScreen,
    ListPicker,
    TextPromptScreen,
    ask_search,
)
from qlora_tui.tui.screens.runs_and_train_commands import RunCommands
from qlora_tui.tui.screens.train.launch_pane import LaunchPane, first_fix, launch, setting_notes
from qlora_tui.tui.screens.train.live_pane import LEVELS, LivePane, LogTail
from qlora_tui.tui.screens.train.outcome import resume_step
from qlora_tui.tui.screens.train.run_follower import RunFollower, RunSnapshot
from qlora_tui.tui.screens.train.step_charts import zoom_start
from qlora_tui.tui.screens.train.suggest_dialog import suggest_settings
from qlora_tui.tui.screens.train.sweep_dialog import start_sweep
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.threads import Measurement, act_on_run
from qlora_tui.tui.widgets.settings_form import SettingEdited, SettingsForm

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp


_NAME_WIDTH = 38
"""Width of a run's name in the list of runs, in cells. Name, state and steps together fill the dialog."""
_MAX_LISTED = 30
"""Maximum number of runs in the list of runs. The Runs screen lists all runs."""
_MAX_ZOOM = 6
_REQUEST_NOTICES: dict[control.Kind, str] = {
    "checkpoint": "The run will save a checkpoint after this step.",
    "evaluate": "The run will measure the validation loss after this step.",
    "sample": "The run will answer the sample prompts after this step.",
    "finish_epoch": "The run will stop at the end of this epoch.",
}
"""Notification for each kind of request."""


RUN_POLL_INTERVAL_S = 1.0
_PREPARING = frozenset(
    ("launch", "suggest", "sweep", "probe", "recheck", "watch_another", "next_tab", "level")
)
"""Actions available while a run is being prepared. All other actions need a run that is being watched."""
_PREPARING_ONLY = frozenset(("launch", "suggest", "sweep", "probe", "recheck"))
_STATES: Mapping[str, Collection[State]] = {
    "pause": ACTIVE,
    "now": (),
    "request": ACTIVE,
    "learning_rate": ACTIVE,
    "stop": ACTIVE,
    "withdraw": frozenset[State](("queued",)),
    "resume": RESUMABLE,
    "chat": ("finished", "stopped", "paused"),
    "export": ("finished", "stopped", "paused"),
    "card": ("finished", "stopped", "paused", "failed", "lost"),
    "answers": ("finished", "stopped"),
}
"""Run states in which each action is available. An action that is not listed is available in all states."""


class TrainScreen(RunCommands):
    """Shows the run that is being watched or, if there is none, the recipe with its checks."""

    MODE = "train"
    ANSWERS_COMMAND = "train.answers"
    CSS_PATH = "train.tcss"
    EDITS_RECIPE = True
    STRIP_TELLS = "nothing"

    def __init__(self) -> None:
        super().__init__()
        self._probing = Measurement(self._show_launch)
        self._probed: tuple[Recipe, StepProbe] | None = None
        """The recipe whose steps were measured last, and the result; None if no steps were measured."""
        self.checks: tuple[Check, ...] = ()
        """Results of the last checks of the recipe."""
        self._expected: Forecast | None = None
        """Expected steps and time of the run; None if unknown."""
        self.snapshot: RunSnapshot | None = None
        """State of the watched run at the last read; None before the first read, and if no run is watched."""
        self._zoom = 0
        """How many times the range of steps in the graphs has been halved."""
        self._follower: RunFollower | None = None
        self._polling = False
        self._is_pinned = False
        """Whether the screen must not switch to another run by itself. True if the user chose the run or the
        pane, or if the screen has already switched to an active run.
        """
        self._ended_at: float | None = None
        """Unix time at which the watched run ended, if the screen chose this run by itself as the newest one.
        None if the user chose the run, or switched to the recipe.
        """
        self._checks_key: object = None
        self._stamps: object = None
        """State of the data files when the screen was last shown or the recipe changed."""

    def compose_body(self) -> Iterable[Widget]:
        yield LaunchPane()
        yield LivePane()

    @property
    def help_state(self) -> str:
        if self.run is None:
            return "before"
        if self.state not in ACTIVE:
            return "queued" if self.state == "queued" else "ended"
        return "running" if self.snapshot is not None and self.snapshot.step else "starting"

    def on_mount(self) -> None:
        self.set_interval(RUN_POLL_INTERVAL_S, self.poll_now)
        self._show_pane()

    def on_screen_resume(self) -> None:
        if self.run is not None and not self.run.path.exists():
            self.notify(f"{self.run.id} was deleted.")
            self._stop_watching()
        self.poll_now()

    @property
    def watched_run(self) -> RunDir | None:
        return self.run

    @property
    def run(self) -> RunDir | None:
        """The run being watched; None while the next run is prepared."""
        return self._follower.run if self._follower else None

    @property
    def target_run(self) -> RunDir:
        """The run being watched. Raises SkipAction if no run is being watched."""
        if self.run is None:
            raise SkipAction
        return self.run

    @property
    def state(self) -> State | None:
        """State of the run being watched; None if no run is watched, or if the run has not been read yet."""
        return self.snapshot.status.state if self.snapshot else None

    @property
    def _is_held(self) -> bool:
        """Whether the run being watched gave up its GPU because of the training hours or another program."""
        hold = self.snapshot.status.hold if self.snapshot else None
        return hold is not None and hold.has_left

    def attach(self, run: RunDir) -> None:
        """Watch a run."""
        self._is_pinned, self._ended_at = True, None
        if self.run != run:
            self._follow(run)

    def _follow(self, run: RunDir) -> None:
        self._follower, self.snapshot, self._zoom = RunFollower(run), None, 0
        self._show_pane()
        self.poll_now()

    def show_recipe(self, recipe: Recipe) -> None:
        if self._ended_at is not None and draft_written_at() > self._ended_at:
            # A user who has edited the recipe since the run ended is about to launch another run.
            self._stop_watching()
        self._show_form(recipe)
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
        """Show how the last run ended, unless the recipe has been edited since then."""
        run, status = system_status.active_or_last, system_status.active_or_last_status
        if run is None or status is None or status.state not in ("finished", *RESUMABLE):
            return
        if status.at and status.at >= draft_written_at():
            self._ended_at = status.at
            self._follow(run)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "probe" and (self._has_to_wait or errors(self.checks)):
            return False
        if action == "fix" and self.run is None:
            return first_fix(self.checks) is not None
        if action == "fix":
            return self.snapshot is not None and self.snapshot.fix is not None
        if action in ("chat", "export") and self.state in ("stopped", "paused") and self.snapshot is not None:
            return bool(self.snapshot.view.checkpoints)
        if self.run is None:
            return action in _PREPARING or not self.has_command(action)
        if action in _PREPARING_ONLY:
            return False
        if action in ("now", "pause") and self._is_held:
            return True
        return action not in _STATES or self.state in _STATES[action]

    def command_label(self, command_id: str) -> str | None:
        if command_id != "train.launch":
            return ""
        if any(check.problem is not None for check in self.checks):
            return None  # the verdict has the reason that the key would show
        if errors(self.checks):
            return "Launch anyway"
        waits = self._has_to_wait or bool(self.app.system_status.waiting_ids)
        return "Queue" if waits else ""

    @property
    def _has_to_wait(self) -> bool:
        """Whether a run that is launched now has to wait, because other runs use all devices."""
        status = self.app.system_status
        return status.active is not None and not status.has_free_device

    def on_setting_edited(self, event: SettingEdited) -> None:
        """Apply the edit of a setting to the recipe."""
        self.app.edit(event.path, event.value)

    def _stop_watching(self) -> None:
        """Stop watching the run, and show the recipe until a run becomes active."""
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
        follower.from_step = zoom_start(step, self._zoom)
        try:
            snapshot = await asyncio.to_thread(follower.poll)
        finally:
            self._polling = False
        if follower is not self._follower:
            self.poll_now()
            return
        before = (self.state, self._is_held, self.snapshot.fix if self.snapshot else None)
        self.snapshot = snapshot
        active = self.app.system_status.active
        another = active.id if active is not None and active != follower.run else ""
        answers = self.progress_of(follower.run.id)
        self.query_one(LivePane).show(snapshot, follower.from_step, another, answers)
        if (self.state, self._is_held, snapshot.fix) != before:
            self.refresh_bindings()

    def _check(self) -> None:
        """If no run is being watched, and anything that the checks depend on has changed, run the checks
        again.
        """
        if self.run is not None:
            return
        system_status, recipe = self.app.system_status, self.app.workbench.recipe
        free, machine = system_status.free_bytes, system_status.machine
        key = (
            recipe,
            self._stamps,
            self.app.counts,
            machine.budget,
            system_status.active,
            system_status.waiting_ids,
            system_status.has_free_device,
            system_status.no_gpu,
            None if free is None else free >> 28,
        )
        if key != self._checks_key:
            self._checks_key = key
            self._start_checks(recipe, machine)
            self.app.count_samples()

    @work(exclusive=True, group="checks")
    async def _start_checks(self, recipe: Recipe, machine: Machine) -> None:
        expected = await asyncio.to_thread(forecast, recipe, machine)
        if expected is not None and self._probed is not None and self._probed[0] == recipe:
            expected = measured_forecast(expected, self._probed[1])
        self._expected = expected
        # Show the checks first without an exact estimate of the memory, then with it.
        for exact_within_s in (0.0, EXACT_WITHIN_S):
            checks = await asyncio.to_thread(preflight, recipe, machine, exact_within_s, expected)
            self._show_checks(recipe, with_count(checks, self.app.count_problem))

    def _show_checks(self, recipe: Recipe, checks: tuple[Check, ...]) -> None:
        self.checks = checks
        self._show_launch()
        self._show_form(recipe)
        self.refresh_bindings()

    def _show_launch(self) -> None:
        recipe, probing = self.app.workbench.recipe, self._probing.progress
        self.query_one(LaunchPane).show_checks(self.checks, recipe, self._expected, probing)

    def _show_form(self, recipe: Recipe) -> None:
        notes = setting_notes(recipe, self._expected)
        self.query_one(LaunchPane).show_settings(recipe, self.app.workbench.preset_recipe, notes)

    def action_suggest(self) -> None:
        suggest_settings(self)

    def action_sweep(self) -> None:
        start_sweep(self)

    def action_probe(self) -> None:
        """Stop measuring if a measurement is in progress; otherwise measure three steps of the recipe."""
        if not self._probing.stop():
            self._probe(self.app.workbench.recipe, self.app.system_status.machine)

    @work(exclusive=True, group="probe")
    async def _probe(self, recipe: Recipe, machine: Machine) -> None:
        def measure(say: Callable[[str], None], should_stop: Callable[[], bool]) -> StepProbe:
            return probe_steps(recipe, lambda progress: say(progress_words(progress)), should_stop)

        try:
            probe = await self._probing.run(measure, "starting")
        except UserError as problem:
            self.app.show_error(problem)
            return
        if probe is not None:
            self._probed, self._checks_key = (recipe, probe), None
            self._check()

    @work(exclusive=True, group="launch")
    async def action_launch(self) -> None:
        # Otherwise, the run and the measurement would compete for memory.
        self._probing.stop()
        recipe, machine = self.app.workbench.recipe, self.app.system_status.machine
        checks = await asyncio.to_thread(preflight, recipe, machine, EXACT_WITHIN_S, self._expected)
        if recipe == self.app.workbench.recipe:
            self._show_checks(recipe, checks)
        run = await launch(self.app, recipe, checks)
        if run is None:
            return
        status = self.app.system_status
        active = None if status.has_free_device else status.active
        if active is not None and active != run:
            self.notify(f"{run.name} is queued. Press {key_name('train.another')} to see it.")
        self.attach(active or run)

    def action_recheck(self) -> None:
        self._checks_key = None
        self.show_recipe(self.app.workbench.recipe)
        self.notify("Checking again.")

    def action_stop(self) -> None:
        snapshot = self.snapshot
        if snapshot is not None and snapshot.is_stopping:
            now = "The run is stopping now. The current step is discarded; earlier steps are saved."
            self._act_on_run(self.target_run, partial(run_actions.stop, now=True), now)
        else:
            outcome = _outcome_of_stopping(snapshot)
            self._confirm(
                "Stop the run?", outcome, run_actions.stop, f"The run will stop{self._when_it_ends}."
            )

    @property
    def _when_it_ends(self) -> str:
        """Return the text that says when the run will stop once the user has asked it to:
        `` after this step`` if training has begun; otherwise empty.
        """
        has_begun = self.snapshot is None or self.snapshot.view.phase in STEP_PHASES
        return " after this step" if has_begun else ""

    def action_pause(self) -> None:
        outcome = f"{_outcome_of_stopping(self.snapshot, pauses=True)} {key_name('train.resume')} resumes it."
        done = "Paused." if self._is_held else f"The run will pause{self._when_it_ends}."
        self._confirm("Pause the run?", outcome, run_actions.pause, done)

    def action_resume(self) -> None:
        step = 0 if self.snapshot is None else resume_step(self.snapshot)
        origin = f"resume from step {step:,}" if step else "start from step 0"
        self._act_on_run(self.target_run, run_actions.resume, f"Queued. The run will {origin}.")

    def action_request(self, kind: control.Kind) -> None:
        """Send a request of this kind to the trainer of the run being watched."""
        self._act_on_run(self.target_run, lambda run: control.send_request(run, kind), _REQUEST_NOTICES[kind])

    def action_learning_rate(self) -> None:
        now = self.snapshot.learning_rate if self.snapshot else None
        self._prompt_for_rate("" if now is None else format_rate(now))

    def _prompt_for_rate(self, proposed: str) -> None:
        run = self.target_run

        def set_rate(typed: str) -> None:
            rate = float(typed)
            self._act_on_run(
                run,
                lambda run: control.send_request(run, "set_learning_rate", rate),
                f"The learning rate will change to {format_rate(rate)} after this step.",
            )

        text = "The new peak learning rate. The schedule continues with this peak."
        self.ask(TextPromptScreen("Learning rate", text, proposed, _rate_problem), set_rate)

    def action_fix(self) -> None:
        if self.run is None:
            self._fix_recipe()
            return
        fix = self.snapshot.fix if self.snapshot else None
        if fix is None:
            return
        if fix.rate is not None:
            self._prompt_for_rate(format_rate(fix.rate))
        elif fix.stop:
            self.action_stop()
        else:
            self._offer_next_run(self.run, fix)

    def _fix_recipe(self) -> None:
        fix = first_fix(self.checks)
        workbench = self.app.workbench
        if fix is not None and workbench.replace(replace_settings(workbench.recipe, fix.changes)):
            self.app.recipe_edited()
            self.notify_undoable(f"{capitalize(fix.label)}.")

    def _offer_next_run(self, run: RunDir, fix: SuggestedFix) -> None:
        def prepare(_yes: bool) -> None:
            if self.app.workbench.replace(replace_settings(run.recipe(), fix.changes)):
                self.app.recipe_edited()
            self.action_prepare()

        text = "This run's recipe will replace the one you are editing. "
        text += f"To undo this, press {key_name('app.undo')}."
        self.ask(ConfirmScreen(f"{capitalize(fix.label)}?", text), prepare)

    def action_watch_another(self) -> None:
        self.ask(run_picker(self.run), self.attach)

    def action_prepare(self) -> None:
        self._stop_watching()
        self._is_pinned = True
        self.show_recipe(self.app.workbench.recipe)

    def action_next_tab(self, places: int) -> None:
        """Show the tab that is ``places`` to the right of the current tab. While a run is prepared, move the
        focus between the recipe and the checks instead.
        """
        if self.run is not None:
            self.query_one(LivePane).next_tab(places)
        elif places > 0:
            self.focus_next()
        else:
            self.focus_previous()

    def action_show_tab(self, name: str) -> None:
        """Show the tab with this name below the graph."""
        self.query_one(LivePane).show_tab(name)

    def action_zoom(self, direction: int) -> None:
        """Halve (1) or double (-1) the range of steps in the graphs. The range ends at the last step."""
        self._zoom = min(max(self._zoom + direction, 0), _MAX_ZOOM)
        self.poll_now()

    def action_level(self) -> None:
        if self.run is None:
            self.query_one(LaunchPane).toggle_checks()
            return
        log = self.query_one(LogTail)
        self.query_one(LivePane).filter_log(log.search, (log.level + 1) % len(LEVELS))

    def action_search(self) -> None:
        pane, log = self.query_one(LivePane), self.query_one(LogTail)
        ask_search(self, "lines", log.search, lambda text: pane.filter_log(text, log.level))

    def _confirm(self, title: str, outcome: str, act: Callable[[RunDir], None], done: str) -> None:
        """Ask whether to act on the run being watched. The question closes by itself once the run is no
        longer active. ``outcome``: what will happen, as text that follows the run's id. ``done``: the
        notification after the action.
        """
        run = self.target_run
        question = ConfirmScreen(
            title, f"{run.id} {outcome}", is_outdated=lambda: read_status(run).state not in ACTIVE
        )
        self.ask(question, lambda _yes: self._act_on_run(run, act, done))

    def act_on_target(self, act: Callable[[RunDir], None], done: str) -> None:
        self._act_on_run(self.target_run, act, done)

    def _act_on_run(self, run: RunDir, act: Callable[[RunDir], None], done: str) -> None:
        def then(_: None) -> None:
            self.notify(done)
            self.poll_now()

        act_on_run(self, run, act, then)


def run_picker(now: RunDir | None) -> ListPicker[RunDir]:
    """Return a dialog in which the user chooses a run. ``now``: the run being watched, which is not listed;
    None if there is none.
    """
    choices = []
    for run in [run for run in all_runs() if run != now][:_MAX_LISTED]:
        status = read_status(run)
        sign, style = SIGNS[status.state]
        steps = f"  step {format_progress(status.step, status.total_steps)}" if status.total_steps else ""
        name = truncate_middle(run.name, _NAME_WIDTH)
        line = Content.assemble((f"{sign} {status.state:<10} ", style), name, (steps, "dim"))
        choices.append(Choice(run, line, run.id))
    return ListPicker("Watch another run", "watch", choices, empty="There are no other runs.")


def _outcome_of_stopping(snapshot: RunSnapshot | None, *, pauses: bool = False) -> str:
    """Return text that follows the run's id in a confirmation: what will happen if the run is paused
    (``pauses``) or stopped.
    """
    if snapshot is None or snapshot.view.phase in STEP_PHASES:
        if pauses:
            return "will save a checkpoint after this step and free its memory."
        best = ""
        if snapshot is not None and snapshot.best is not None and snapshot.is_best_saved:
            best = f" Its best checkpoint, of step {snapshot.best.step:,}, is kept."
        return f"will save a checkpoint and the adapter of this step, then stop. It can be resumed.{best}"
    if snapshot.view.checkpoints:
        return "has not trained a step since it was resumed. It can be resumed from its last checkpoint."
    return "has not trained a step yet, so nothing is saved. If resumed, it starts from step 0."


def _rate_problem(text: str) -> str:
    """Return the error in a typed learning rate; empty if the text is a valid learning rate."""
    try:
        rate = float(text)
    except ValueError:
        return "Enter a number, such as 1e-4."
    return "" if 0 < rate <= 1 else "The learning rate must be above 0 and at most 1."


async def show_run(app: QloraApp, run: RunDir) -> None:
    """Switch to the Train screen and watch this run."""
    await app.switch_mode("train")
    if isinstance(app.screen, TrainScreen):
        app.screen.attach(run)


async def prepare_run(app: QloraApp) -> None:
    """Switch to the Train screen and show the recipe, to prepare the next run."""
    await app.switch_mode("train")
    if isinstance(app.screen, TrainScreen):
        app.screen.action_prepare()
