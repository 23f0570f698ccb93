"""Actions on sweeps, shared by the command line and the app: start, pause, resume, stop, add time, adopt."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from qlora_tui.catalog.local_models import load_architecture
from qlora_tui.errors import UsageError, UserError, disk_problems
from qlora_tui.gpu.visible_devices import requested_gpus
from qlora_tui.locks import locked
from qlora_tui.memory import estimate
from qlora_tui.memory.budget import local_budget
from qlora_tui.recipe import presets
from qlora_tui.runs import actions, run_queue
from qlora_tui.runs.process import ensure_runner
from qlora_tui.runs.status import ACTIVE, read_status, refuse_other_machines
from qlora_tui.sweeps.directory import SweepDir, SweepEnded, SweepPaused, SweepResumed, create_sweep
from qlora_tui.sweeps.driver import LOCK_S, advance, stop_runs
from qlora_tui.sweeps.sheet import Sheet
from qlora_tui.sweeps.space import Point, apply_point, extremes
from qlora_tui.sweeps.study import require_optuna
from qlora_tui.sweeps.view import SweepView, read_sweep, time_left

_UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?")


def parse_duration(text: str) -> float:
    """Parse ``3h``, ``90m``, ``1h30m`` or ``45s`` to seconds. Raises UserError, exit code 2."""
    match = _DURATION.fullmatch(text.replace(" ", "").lower())
    seconds = (
        sum(float(part) * unit for part, unit in zip(match.groups(), _UNITS_S.values(), strict=True) if part)
        if match
        else 0.0
    )
    if seconds <= 0:
        raise UsageError("Invalid time", what=f"{text!r} is not a duration.", fix="Write 3h, 90m or 1h30m.")
    return seconds


def parse_until(text: str, now: float | None = None) -> float:
    """Return the Unix time of the next moment with a local time of day such as ``07:00``.

    Raises UserError, exit code 2.
    """
    match = re.fullmatch(r"(\d{1,2}):(\d\d)", text.strip())
    if not match or int(match[1]) > 23 or int(match[2]) > 59:
        raise UsageError("Invalid time", what=f"{text!r} is not a time of day.", fix="Write 07:00 or 23:30.")
    start = datetime.fromtimestamp(time.time() if now is None else now)
    end = start.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0, fold=0)
    # When clocks are set back, a time occurs twice.
    ends = [each.replace(fold=fold).timestamp() for each in (end, end + timedelta(days=1)) for fold in (0, 1)]
    return next(each for each in ends if each > start.timestamp())


@disk_problems()
def start(sheet: Sheet, deadline: float | None = None) -> SweepDir:
    """Check a sweep, create it and queue its first runs.

    Args:
        sheet: The recipe and the varied settings.
        deadline: Unix time at which the sweep must end, which then determines the number of trials.

    Raises:
        UserError: The sweep is invalid, or the disk is full.
    """
    check(sheet, has_time=deadline is not None)
    refuse_other_machines()
    sweep = create_sweep(sheet, deadline, requested_gpus())
    try:
        advance(sweep)
    except BaseException:
        # This also handles Ctrl+C. A full disk has no room for the record.
        with suppress(UserError, OSError):
            stop(sweep)
        sweep.active_path.unlink(missing_ok=True)
        raise
    ensure_runner()
    return sweep


def check(sheet: Sheet, *, has_time: bool) -> None:
    """Raise UserError if a sweep is invalid. ``has_time`` says whether it has a deadline."""
    sheet.check(has_time=has_time)
    if sheet.sweep.method == "tpe":
        require_optuna()


def heaviest_point(sheet: Sheet) -> Point:
    """Return, for each varied setting, the value that takes the most memory. Raises UserError."""
    architecture, device = load_architecture(sheet.recipe.model.id), local_budget().device

    def needed(path: str, value: object) -> int:
        recipe = apply_point(sheet.recipe, {path: value})
        return estimate(recipe, architecture, device=device).process_bytes

    return {
        path: max(extremes(path, values), key=partial(needed, path))
        for path, values in sheet.sweep.vary.items()
    }


@disk_problems()
def pause(sweep: SweepDir) -> None:
    """Pause a sweep: its runs save and free their devices.

    Raises UserError unless the sweep is running, or waits for a run that the user paused.
    """
    with locked(sweep.lock_path, patience_s=LOCK_S):
        view = _require(sweep, "running", "waiting")
        sweep.append(SweepPaused())
        sweep.active_path.unlink(missing_ok=True)
        _pause_runs(view)


@disk_problems()
def resume(sweep: SweepDir) -> None:
    """Continue a sweep that is paused, or that waits for a run paused by the user. Raises UserError."""
    if time_left(_require(sweep, "paused", "waiting")) <= 0:
        raise UsageError(
            "The deadline has passed",
            what=f"The deadline of {sweep.id} has passed, so nothing more would be trained.",
            fix=f"Extend the sweep: `qlora-tui sweep add-time {sweep.id} 2h`.",
        )
    _go_on(sweep, None)


@disk_problems()
def add_time(sweep: SweepDir, seconds: float) -> float:
    """Extend a sweep to ``seconds`` after its deadline, or after now if that is later.

    Returns the new deadline as a Unix time.

    A sweep that has ended continues: first with the trials that its deadline interrupted, then with new ones.
    Raises UserError.
    """
    view = _require(sweep, "running", "waiting", "paused", "finished", "stopped")
    if view.state == "stopped" and any(trial.outcome == "training" for trial in view.trials):
        raise UsageError(
            "The sweep cannot be extended yet",
            what="A run of the sweep is still saving.",
            fix="Wait until the run has stopped.",
        )
    deadline = max(view.deadline or 0.0, time.time()) + seconds
    _go_on(sweep, deadline)
    return deadline


@disk_problems()
def stop(sweep: SweepDir) -> None:
    """Stop a sweep: runs in training save and stop, and the others are removed from the queue.

    Raises UserError if the sweep has ended.
    """
    with locked(sweep.lock_path, patience_s=LOCK_S):
        view = _require(sweep, "running", "waiting", "pausing", "paused")
        sweep.append(SweepEnded(why="stopped"))
        sweep.active_path.unlink(missing_ok=True)
        stop_runs(view)


@disk_problems()
def adopt(sweep: SweepDir, name: str, trial: int | None = None) -> tuple[int, Path]:
    """Save the recipe of a trial, by default the winner, as a preset. Raises UserError.

    Returns the trial's number and the preset's path.
    """
    view = read_sweep(sweep)
    chosen = view.winner if trial is None else next((t for t in view.trials if t.number == trial), None)
    if chosen is None:
        what = "no trial has completed all of its steps" if trial is None else f"there is no trial {trial}"
        raise UsageError(
            "Nothing to adopt",
            what=f"{sweep.id}: {what}.",
            fix=f"`qlora-tui sweep show {sweep.id}` lists the trials.",
        )
    note = f"Trial {chosen.number} of the sweep {sweep.id}."
    return chosen.number, presets.save(name, view.recipe_of(chosen), note=note)


def _go_on(sweep: SweepDir, deadline: float | None) -> None:
    refuse_other_machines()
    with locked(sweep.lock_path, patience_s=LOCK_S):
        sweep.append(SweepResumed(deadline=deadline))
        sweep.active_path.touch(mode=0o600)
    advance(sweep)
    ensure_runner()


def _require(sweep: SweepDir, *states: str) -> SweepView:
    view = read_sweep(sweep)
    if view.state not in states:
        fix = f"`qlora-tui sweep show {sweep.id}` shows the sweep."
        if view.state == "pausing":
            fix = "Wait until its run has saved."
        raise UsageError("Not possible in this state", what=f"{sweep.id} is {view.state}.", fix=fix)
    return view


def _pause_runs(view: SweepView) -> None:
    for trial in view.trials:
        if trial.run is None or trial.is_settled:
            continue
        # A run that is just ending needs no pause.
        with suppress(UserError):
            if not run_queue.pause(trial.run) and read_status(trial.run).state in ACTIVE:
                actions.pause(trial.run)
