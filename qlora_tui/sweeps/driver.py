"""Decides and executes the next steps of a sweep: creates and queues runs, ends rounds, ends the sweep.

The runner calls ``python -m qlora_tui.sweeps.driver ID`` after each run of a sweep. It calls the driver
without an ID, for all active sweeps, when the runner starts and before it exits. No process runs for the
whole sweep. The next step follows from the folders alone, each decision is recorded before it is executed,
and executing it twice changes nothing. Therefore a kill at any moment loses nothing.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import msgspec

from qlora_tui.errors import EXIT_FAILURE, UsageError, UserError
from qlora_tui.gpu.visible_devices import with_choice
from qlora_tui.locks import locked
from qlora_tui.recipe.conflicts import check_conflicts
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions, notify, run_queue
from qlora_tui.runs.devices import wanted_devices
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.status import ACTIVE, is_stranded, read_status
from qlora_tui.sweeps.describe import verdict_sentence
from qlora_tui.sweeps.directory import (
    EndReason,
    GroupPlanned,
    Role,
    RoundEnded,
    RunAgain,
    RunMade,
    RunRefused,
    SweepDir,
    SweepEnded,
    TrialChosen,
    all_sweeps,
    find_sweep,
)
from qlora_tui.sweeps.plan import Costs, keep_best, plan_group
from qlora_tui.sweeps.space import Point, grid_points, random_point
from qlora_tui.sweeps.study import propose, write_journal
from qlora_tui.sweeps.view import Group, SweepView, Trial, read_sweep, time_left
from qlora_tui.worker import start_detached

_DRAWS = 1000
"""Number of random points that are drawn in addition to one for each earlier trial. If all drawn points have
been tried, all points count as tried.
"""
LOCK_S = 120.0
"""Seconds to wait for another driver's lock, which is normally held for less than one second."""


def advance(sweep: SweepDir) -> None:
    """Take the next steps of a sweep until it has ended or must wait for a runner to train its runs.

    Does nothing if another process keeps the lock for more than :data:`LOCK_S`. Raises UserError, OSError.
    """
    with locked(sweep.lock_path, patience_s=LOCK_S) as lock:
        if lock is None:
            return
        while _Step(read_sweep(sweep)).take():
            pass


class _Step:
    """Decides on one step, given the current state of the sweep."""

    def __init__(self, view: SweepView) -> None:
        self._view = view
        self._sweep = view.sweep
        self._settings = view.sheet.sweep

    def take(self) -> bool:
        """Decide and act; return whether another step may follow immediately."""
        view = self._view
        if view.state not in ("running", "waiting"):
            self._sweep.active_path.unlink(missing_ok=True)
            return False
        left = time_left(view)
        if left <= 0:
            return self._end_by_time()
        changed = [self._make_or_continue(trial) for trial in view.trials]
        if any(changed):
            return True
        if not view.base_trials:
            return self._choose("base", {}, seed=self._seed(0))
        if view.base_trials[0].is_settled and view.base_trials[0].final is None:
            return self._end("base_failed")
        if (left != float("inf") or self._is_sequential) and not view.base_trials[0].is_settled:
            return False
        group = view.groups[-1] if view.groups else None
        if group is None:
            return self._plan_group(1)
        if self._fill(group):
            return True
        trials = view.of_group(group.number)
        if not all(trial.is_settled for trial in trials) or not view.base_trials[0].is_settled:
            return False
        if group.round < group.planned.rounds:
            return self._end_round(group, trials)
        if left != float("inf") and self._plan_group(group.number + 1):
            return True
        return self._conclude()

    @property
    def _is_sequential(self) -> bool:
        """Whether the values of a trial depend on the results of earlier trials."""
        return self._settings.method == "tpe"

    def _seed(self, number: int) -> int:
        return (self._view.sheet.recipe.training.seed + number) % 2**32

    def _choose(self, role: Role, *points: Point, seed: int, group: int = 0) -> bool:
        """Record a trial for each of these points; return whether there were any points."""
        for number, values in enumerate(points, start=len(self._view.trials)):
            self._sweep.append(TrialChosen(number=number, role=role, group=group, values=values, seed=seed))
        return bool(points)

    def _make_or_continue(self, trial: Trial) -> bool:
        """Do what a trial's run needs next; return whether anything was done.

        The run is created, queued so that it continues, or marked as stopped if the trial was dropped. A
        trial that cannot be trained is recorded as refused.
        """
        run = trial.run
        if run is None:
            if trial.outcome != "waiting":
                return False
            try:
                recipe = _recipe_of(self._view, trial)
            except UsageError as problem:
                if trial.number == 0:
                    raise
                # The settings contradict each other, or the initial adapter was deleted, so this trial can
                # never train.
                self._sweep.append(RunRefused(number=trial.number, why=problem.title))
                return True
            run = create_run(
                recipe,
                self._view.gpu,
                sweep=f"{self._sweep.id} {trial.number}",
                pause_at=trial.target if trial.target < 1 else None,
            )
            self._sweep.append(RunMade(number=trial.number, run=run.id))
            run_queue.enqueue(run)
            return True
        if is_stranded(run):
            run_queue.enqueue(run)
            return True
        if trial.is_interrupted:
            if trial.state in ("failed", "lost"):
                self._sweep.append(RunAgain(number=trial.number))
            run.set_pause_at(trial.target if trial.target < 1 else None)
            run_queue.requeue(run)
            return True
        if trial.outcome == "dropped" and trial.state == "paused":
            number = max(trial.results, default=0)
            run_queue.mark_not_queued(run, f"Not kept after round {number} of its sweep.")
            return True
        return False

    def _plan_group(self, number: int) -> bool:
        view, settings = self._view, self._settings
        # Added time allows more trials than the first group had, but a grid has a fixed number.
        asked = view.sheet.number_of_trials() if number == 1 or settings.method == "grid" else 0
        rounds, costs = settings.rounds, self._costs()
        if number > 1 and not view.of_group(number - 1):
            # Every point has been tried.
            return False
        if view.deadline is None:
            plan_trials, plan_rounds = asked, rounds or 1
        else:
            assert costs is not None
            used = self._number_of_trials()
            if asked and used >= asked:
                return False
            plan = plan_group(
                costs,
                time_left(view),
                trials=asked - used if asked else 0,
                rounds=rounds,
                can_halve=view.sheet.is_safe_to_halve,
                confirmations=2 * (settings.seeds - 1),
            )
            if plan is None:
                return number == 1 and self._end("time")
            plan_trials, plan_rounds = plan.trials, plan.rounds
        self._sweep.append(
            GroupPlanned(
                group=number,
                trials=plan_trials,
                rounds=plan_rounds,
                full_s=costs.full_s if costs else None,
                extra_s=costs.extra_s if costs else 0.0,
            )
        )
        return True

    def _costs(self) -> Costs | None:
        costs = self._view.costs
        return None if costs is None else Costs(costs.full_s, costs.extra_s, _parallel_runs(self._view))

    def _fill(self, group: Group) -> bool:
        """Choose the missing trials of a group (with ``tpe``, one); return whether any was chosen."""
        trials = self._view.of_group(group.number)
        missing = group.planned.trials - len(trials)
        if group.ended or missing <= 0:
            return False
        if self._is_sequential:
            if sum(not trial.is_settled for trial in trials) >= _parallel_runs(self._view):
                return False
            points = [propose(self._view, self._number_of_trials())]
        else:
            points = list(islice(self._points(), missing))
        return self._choose("trial", *points, seed=self._seed(0), group=group.number)

    def _number_of_trials(self) -> int:
        return sum(trial.role == "trial" for trial in self._view.trials)

    def _points(self) -> Iterator[Point]:
        """Yield the untried points of the grid, or untried random points, always in the same order."""
        settings = self._settings
        if settings.method == "grid":
            yield from islice(grid_points(settings.vary), self._number_of_trials(), None)
            return
        chosen = [trial.values for trial in self._view.trials if trial.role == "trial"]
        for number in range(len(chosen) + _DRAWS):
            point = random_point(settings.vary, settings.seed, number)
            if point not in chosen:
                chosen.append(point)
                yield point

    def _end_round(self, group: Group, trials: list[Trial]) -> bool:
        in_round = [t for t in trials if not any(t.number in ended.dropped for ended in group.ended)]
        # A trial that failed or was stopped after its validation cannot continue.
        losses = {
            t.number: t.results[group.round].loss
            if group.round in t.results and t.outcome in ("reached", "finished")
            else None
            for t in in_round
        }
        costs = self._costs() if self._view.deadline is not None else None
        left = time_left(self._view)
        if costs is not None:
            left -= costs.of_whole_runs(2 * (self._settings.seeds - 1))
        kept = keep_best(losses, len(in_round), costs, left, group.round, group.planned.rounds)
        dropped = tuple(number for number in losses if number not in kept)
        self._sweep.append(RoundEnded(group=group.number, round=group.round, kept=kept, dropped=dropped))
        return True

    def _end_by_time(self) -> bool:
        """Remove waiting runs from the queue; end the sweep and return True if no run is in training."""
        queued = [trial for trial in self._view.trials if trial.outcome == "waiting" and trial.run]
        for trial in queued:
            assert trial.run is not None
            run_queue.pause(trial.run)
        if any(trial.outcome == "training" for trial in self._view.trials):
            return False
        return self._end("time")

    def _conclude(self) -> bool:
        """If the winner's loss is lower than the base's, choose the next run of either with another seed.

        The sweep ends if no such run is needed, or once all of them have ended.
        """
        view, winner = self._view, self._view.winner
        base = view.base_trials[0].final
        if winner is None or winner.final is None or base is None:
            return self._end("all_failed")
        if winner.final.loss >= base.loss or self._settings.seeds == 1:
            return self._end("done")
        chosen = [(one.role, one.seed) for one in [*view.base_trials, *view.confirmations_of(winner)]]
        for number in range(1, self._settings.seeds):
            seed = self._seed(number)
            if ("base", seed) not in chosen:
                return self._choose("base", {}, seed=seed)
            if ("confirmation", seed) not in chosen:
                return self._choose("confirmation", winner.values, seed=seed)
        if not all(trial.is_settled for trial in view.trials):
            return False
        return self._end("done")

    def _end(self, why: EndReason) -> bool:
        self._sweep.append(SweepEnded(why=why))
        if why == "base_failed":
            stop_runs(self._view)
        with suppress(OSError):
            write_journal(self._view)
            start_detached(
                "qlora_tui.sweeps.driver:notify_end",
                self._sweep.path,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        return True


def stop_runs(view: SweepView) -> None:
    """Make the runs in training save and stop, and remove the others from the queue."""
    for trial in view.trials:
        if trial.run is not None and read_status(trial.run).state in ("queued", *ACTIVE):
            # A run that is just ending needs no request.
            with suppress(UserError):
                actions.stop(trial.run)


def notify_end(folder: Path) -> None:
    """Notify the user that the sweep in a folder has ended. Raises UserError."""
    view = read_sweep(SweepDir(folder))
    winner = view.winner
    notify.send(
        notify.RunNotification(
            event="failed" if view.state == "failed" else "finished",
            run=view.sweep.id,
            name=view.sheet.name,
            text=f"The sweep {view.sweep.id} has ended. {verdict_sentence(view)}",
            step=sum(trial.is_settled for trial in view.trials),
            total_steps=len(view.trials),
            best_loss=winner.final.loss if winner and winner.final else None,
        )
    )


def _recipe_of(view: SweepView, trial: Trial) -> Recipe:
    """Return the recipe of a trial's run, without reports that cost time and do not affect the weights.

    Raises UsageError if the recipe cannot be trained.
    """
    replace = msgspec.structs.replace
    recipe = view.recipe_of(trial)
    training = replace(
        recipe.training,
        seed=trial.seed,
        keep_checkpoints=1,
        sample_prompts=(),
        task_prompts=0,
        general_prompts=recipe.training.general_prompts if recipe.training.forgetting_weight else 0,
    )
    # Use the same rows for every seed.
    data = replace(recipe.data, validation_seed=view.sheet.recipe.split_seed or 1)
    name = f"{view.sheet.name[:60]} {'base' if trial.role == 'base' else trial.role} {trial.number}"
    recipe = replace(recipe, name=name, training=training, data=data)
    check_conflicts(recipe)
    return actions.with_initial_adapter(recipe)


def _parallel_runs(view: SweepView) -> int:
    """Return how many runs can train at the same time; 1 without a GPU, or if the number is unknown."""
    with suppress(UserError):
        wanted = wanted_devices(view.sheet.recipe, with_choice(view.gpu))
        return max(1, len(wanted.devices) // wanted.count)
    return 1


def active_sweeps() -> Iterator[SweepDir]:
    """Yield the sweeps that have work to do."""
    return (sweep for sweep in all_sweeps() if sweep.active_path.exists())


def main(arguments: list[str]) -> int:
    """Advance the named sweeps, or by default all active ones; return the exit code."""
    code = 0
    for sweep in [find_sweep(name) for name in arguments] or list(active_sweeps()):
        try:
            advance(sweep)
        except (UserError, OSError) as problem:
            print(f"{time.strftime('%H:%M:%S')} sweep {sweep.id}: {problem}", file=sys.stderr)
            code = EXIT_FAILURE
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
