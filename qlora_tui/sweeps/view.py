"""The state of a sweep, read from its folder and its runs, for the screen, the command line and the driver.

Only reads files, which takes milliseconds for tens of trials. Requires neither torch nor Optuna.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, Literal, TypeAlias

from qlora_tui import paths
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import events
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.status import ACTIVE, State
from qlora_tui.runs.view import RunView
from qlora_tui.sweeps.directory import (
    AnyRecord,
    Began,
    GroupPlanned,
    Role,
    RoundEnded,
    RunAgain,
    RunMade,
    RunRefused,
    SweepDir,
    SweepEnded,
    SweepPaused,
    SweepResumed,
    TrialChosen,
)
from qlora_tui.sweeps.plan import Costs, Verdict, judge, kept_of, share_of
from qlora_tui.sweeps.sheet import Sheet
from qlora_tui.sweeps.space import apply_point

_STEPS = 200
"""Number of steps sampled from a run. A curve on a screen has fewer cells."""
MOST_AGAIN = 3
"""Maximum number of times that a trial continues from its checkpoint after its process was killed."""
SweepState: TypeAlias = Literal["running", "waiting", "pausing", "paused", "finished", "stopped", "failed"]
"""``waiting``: the user paused every run that is left. ``pausing``: a run is still saving a checkpoint."""
Outcome: TypeAlias = Literal[
    "waiting", "training", "paused", "reached", "dropped", "finished", "failed", "stopped"
]
"""``reached``: the trial completed its round with a result. ``dropped``: it does not continue."""
_KILLED = ("killed", "lost")


@dataclass(frozen=True)
class Result:
    """The result of a trial at the end of a round."""

    step: int
    tokens: int
    """Tokens that the trial was trained on so far, without padding; 0 if unknown."""
    loss: float
    """Validation loss, plus weighted forgetting if the recipe sets its weight. Lower is better."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, with its role."""

    number: int
    role: Role
    group: int
    values: dict[str, Any]
    """Values of the varied settings; empty for the base."""
    seed: int
    run: RunDir | None
    """The run; None until it is created, and after it was deleted."""
    state: State
    """State of the run; ``gone`` if there is none."""
    outcome: Outcome
    target: float
    """Share of the trial's steps at which its current round ends."""
    rounds: int = 1
    """Number of rounds of the trial's group; 1 for a run of the base or a confirmation."""
    results: dict[int, Result] = field(default_factory=dict)
    """Results by round, from 1. If there is one round, its result is that of the whole run."""
    total_steps: int = 0
    step: int = 0
    steps: tuple[int, ...] = ()
    """Steps that ``losses`` belong to."""
    losses: tuple[float, ...] = ()
    """Sampled training losses; NaN for a loss that was not a number."""
    evaluations: tuple[tuple[int, float], ...] = ()
    """Step and validation loss of each evaluation."""
    tokens_per_s: float | None = None
    failure: str = ""
    """Title of the error if the run failed or was refused; ``Deleted`` if it was deleted; otherwise empty."""
    is_interrupted: bool = False
    """Whether the run stopped early and must be queued again. True if it was paused before the trial was last
    told to train, if it was stopped together with a sweep that has continued since, or if its process was
    killed, at most ``MOST_AGAIN`` times.
    """
    seconds: tuple[float, float] | None = None
    """Training time and other time (loading, evaluations) of a finished run, in seconds; otherwise None."""

    @property
    def is_settled(self) -> bool:
        """Whether the trial has nothing left to do in this round."""
        return self.outcome not in ("waiting", "training", "paused")

    @property
    def final(self) -> Result | None:
        """Result after all steps; None before that, or if the loss is not a number."""
        return self.results.get(self.rounds) if self.outcome == "finished" else None


@dataclass(frozen=True)
class Group:
    """Trials that are compared in the same rounds of successive halving."""

    number: int
    planned: GroupPlanned
    ended: tuple[RoundEnded, ...]
    """The rounds that have ended, in order."""

    @property
    def round(self) -> int:
        """The current round, from 1."""
        return len(self.ended) + 1

    @property
    def target(self) -> float:
        """Share of the steps (0 to 1) at which this round ends."""
        return share_of(min(self.round, self.planned.rounds), self.planned.rounds)


@dataclass(frozen=True)
class SweepView:
    """State of a sweep."""

    sweep: SweepDir
    sheet: Sheet
    state: SweepState
    began_at: float
    """Unix time at which the sweep began."""
    deadline: float | None
    """Unix time of the deadline; None if there is none."""
    gpu: str
    """The GPUs that the user chose for the sweep; empty for any."""
    ended: SweepEnded | None
    trials: tuple[Trial, ...]
    """Every run in the order in which it was chosen: base, trials and confirmations."""
    groups: tuple[Group, ...]

    @property
    def base_trials(self) -> list[Trial]:
        """Runs of the unchanged recipe. The first has the seed of the trials."""
        return [trial for trial in self.trials if trial.role == "base"]

    @property
    def rounds(self) -> int:
        """The largest number of rounds of any group, at least 1."""
        return max((group.planned.rounds for group in self.groups), default=1)

    def of_group(self, number: int) -> list[Trial]:
        """Return the trials of a group."""
        return [trial for trial in self.trials if trial.role == "trial" and trial.group == number]

    @property
    def winner(self) -> Trial | None:
        """The trial with the lowest loss among those with all steps completed; None if there is none."""
        finished = [trial for trial in self.trials if trial.role == "trial" and trial.final is not None]
        return min(finished, key=lambda trial: trial.final.loss if trial.final else math.inf, default=None)

    def confirmations_of(self, trial: Trial) -> list[Trial]:
        """Return the runs with the values of ``trial`` and other seeds."""
        return [one for one in self.trials if one.role == "confirmation" and one.values == trial.values]

    def mean_of(self, trial: Trial) -> float | None:
        """Return the mean loss of a trial that was repeated with other seeds; None if it was not.

        As in the verdict, it is the mean of the repeats alone, since the trial itself was selected for its
        loss. For the unchanged recipe, it is the mean of all its runs.
        """
        is_base = trial.role == "base"
        runs = self.base_trials if is_base else self.confirmations_of(trial)
        losses = [run.final.loss for run in runs if run.final is not None]
        return mean(losses) if len(losses) > is_base else None

    @property
    def costs(self) -> Costs | None:
        """Time of a run of this sweep, as measured on the base's first run; None until that run finishes."""
        seconds = self.base_trials[0].seconds if self.base_trials else None
        return None if seconds is None else Costs(*seconds)

    @property
    def verdict(self) -> Verdict:
        """Whether the best trial so far is better than the base by more than the noise between seeds."""
        winner = self.winner
        base = [trial.final.loss for trial in self.base_trials if trial.final is not None]
        if winner is None or winner.final is None or not base:
            return Verdict("no_result", None if winner is None else winner.number)
        fresh = [one.final.loss for one in self.confirmations_of(winner) if one.final is not None]
        return judge(winner.number, winner.final.loss, fresh, base)

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the remaining runs take, derived from the costs; None if unknown.

        Groups of trials that may be added before the deadline are not included.
        """
        costs = self.costs
        if costs is None or not self.groups or self.state not in ("running", "waiting"):
            return None
        group, confirmations = self.groups[-1], 2 * (self.sheet.sweep.seeds - 1)
        rounds, number = group.planned.rounds, group.round
        trials = self.of_group(group.number)
        open_ = sum(not trial.is_settled for trial in trials)
        missing = 0 if group.ended else group.planned.trials - len(trials)
        in_round = sum(trial.outcome not in ("dropped", "stopped", "failed") for trial in trials) + missing
        seconds = costs.of_round(open_ + missing, min(number, rounds), rounds)
        if number < rounds:
            seconds += costs.of_rounds(kept_of(in_round), rounds, number + 1)
        whole = [trial for trial in self.trials if trial.role != "trial"]
        started = len(whole) - 1
        return seconds + costs.of_whole_runs(
            confirmations - started + sum(not trial.is_settled for trial in whole)
        )

    def recipe_of(self, trial: Trial) -> Recipe:
        """Return the recipe with a trial's values, to adopt it or to compare it.

        It keeps the recipe's settings for reports, which the driver removes for the trial's run.
        """
        return apply_point(self.sheet.recipe, trial.values)

    def unequal_tokens(self) -> list[Trial]:
        """Return trials whose tokens differ from the median of their round by more than 5 %."""
        unequal = []
        for group in self.groups:
            for number in range(1, group.planned.rounds + 1):
                reached = [
                    t for t in self.of_group(group.number) if number in t.results and t.results[number].tokens
                ]
                tokens = sorted(trial.results[number].tokens for trial in reached)
                middle = tokens[len(tokens) // 2] if tokens else 0
                unequal += [t for t in reached if abs(t.results[number].tokens - middle) > 0.05 * middle]
        return list({trial.number: trial for trial in unequal}.values())


def read_sweep(sweep: SweepDir) -> SweepView:
    """Read a sweep and its runs. Raises UserError if its sheet cannot be read."""
    sheet, records = sweep.sheet(), sweep.records()
    groups = _groups(records)
    runs = _runs_of(sweep, records)
    trials = tuple(_trial(chosen, records, groups, runs) for chosen in _of(records, TrialChosen))
    marks = [one for one in records if isinstance(one, Began | SweepPaused | SweepResumed | SweepEnded)]
    last = marks[-1] if marks else Began(at=0.0)
    deadlines = [one.deadline for one in marks if isinstance(one, Began | SweepResumed) and one.deadline]
    return SweepView(
        sweep=sweep,
        sheet=sheet,
        state=_state(last, trials),
        began_at=marks[0].at if marks else 0.0,
        deadline=deadlines[-1] if deadlines else None,
        gpu=next((one.gpu for one in marks if isinstance(one, Began)), ""),
        ended=last if isinstance(last, SweepEnded) else None,
        trials=trials,
        groups=groups,
    )


def _of(records: list[AnyRecord], kind: type[Any]) -> Iterator[Any]:
    return (record for record in records if isinstance(record, kind))


def _groups(records: list[AnyRecord]) -> tuple[Group, ...]:
    rounds: dict[int, dict[int, RoundEnded]] = {}
    for ended in _of(records, RoundEnded):
        rounds.setdefault(ended.group, {}).setdefault(ended.round, ended)
    planned = {one.group: one for one in _of(records, GroupPlanned)}
    return tuple(
        Group(number, plan, tuple(rounds.get(number, {}).values())) for number, plan in planned.items()
    )


def _runs_of(sweep: SweepDir, records: list[AnyRecord]) -> dict[int, RunDir]:
    """Return the run of each trial. A run created just before a crash is found by the mark in its folder."""
    runs = {one.number: RunDir(paths.runs_dir() / one.run) for one in _of(records, RunMade)}
    missing = {one.number for one in _of(records, TrialChosen)} - runs.keys()
    if missing:
        for run in all_runs():
            number = run.trial_of(sweep.id)
            if number in missing:
                runs[number] = run
    return runs


def _state(last: AnyRecord, trials: tuple[Trial, ...]) -> SweepState:
    match last:
        case SweepEnded():
            ends: dict[str, SweepState] = {
                "stopped": "stopped",
                "base_failed": "failed",
                "all_failed": "failed",
            }
            return ends.get(last.why, "finished")
        case SweepPaused():
            return "pausing" if any(trial.outcome == "training" for trial in trials) else "paused"
        case _:
            open_ = [trial for trial in trials if not trial.is_settled]
            held = [trial for trial in open_ if trial.outcome == "paused" and not trial.is_interrupted]
            return "waiting" if held and len(held) == len(open_) else "running"


def _trial(
    chosen: TrialChosen, records: list[AnyRecord], groups: tuple[Group, ...], runs: dict[int, RunDir]
) -> Trial:
    number, run = chosen.number, runs.get(chosen.number)
    group = (
        next((one for one in groups if one.number == chosen.group), None) if chosen.role == "trial" else None
    )
    dropped = next((one.round for one in group.ended if number in one.dropped), None) if group else None
    rounds = group.planned.rounds if group else 1
    target = 1.0 if group is None else group.target if dropped is None else share_of(dropped, rounds)
    facts: dict[str, Any] = {
        "number": number,
        "role": chosen.role,
        "group": chosen.group,
        "values": chosen.values,
        "seed": chosen.seed,
        "target": target,
        "rounds": rounds,
    }
    if run is None or not run.path.is_dir():
        refused = next((one.why for one in _of(records, RunRefused) if one.number == number), "")
        outcome: Outcome = "failed" if refused else "waiting" if run is None else "stopped"
        failure = refused or ("" if run is None else "Deleted")
        return Trial(**facts, run=None, state="gone", outcome=outcome, failure=failure)
    view, _ = RunView.from_sample(run, _STEPS)
    results = dict(_results(view, rounds))
    # True also if the validation loss is not a number.
    is_reached = any(event.step >= _last_step(view, target) for event in view.evaluations if event.step)
    ending = view.ending
    goes_from = max(_go_times(number, records), default=0.0)
    killed = isinstance(ending, events.Failed) and ending.kind in _KILLED
    again = sum(one.number == number for one in _of(records, RunAgain))
    state = view.status.state
    is_interrupted = (
        (state == "paused" and not is_reached and view.status.at <= goes_from)
        or ((killed or state == "lost") and again < MOST_AGAIN)
        or (state == "stopped" and dropped is None and _was_stopped(view.status.at, records))
    ) and state not in ("queued", *ACTIVE)
    return Trial(
        **facts,
        run=run,
        state=state,
        outcome=_outcome(state, is_reached, dropped is not None, is_interrupted),
        results=results,
        total_steps=view.total_steps,
        step=view.step,
        steps=tuple(view.series.step),
        losses=tuple(view.series.loss),
        evaluations=tuple((e.step, loss) for e in view.evaluations if (loss := _score(e)) is not None),
        tokens_per_s=view.series.tokens_per_s[-1] if len(view.series) else None,
        failure=ending.title if isinstance(ending, events.Failed) else "",
        is_interrupted=is_interrupted,
        seconds=_seconds(view),
    )


def _outcome(state: State, is_reached: bool, is_dropped: bool, is_interrupted: bool) -> Outcome:
    if state in ACTIVE:
        return "training"
    if state == "queued":
        return "waiting"
    if is_interrupted:
        return "paused"
    if state == "finished":
        return "finished" if is_reached else "failed"
    if is_dropped and state in ("paused", "stopped"):
        return "dropped"
    if state == "paused":
        return "reached" if is_reached else "paused"
    return "stopped" if state == "stopped" else "failed"


def _go_times(number: int, records: list[AnyRecord]) -> Iterator[float]:
    """Yield the Unix times at which a trial was told to train. A pause after the last one is the user's."""
    for record in records:
        match record:
            case TrialChosen() | RunAgain() if record.number == number:
                yield record.at
            case RoundEnded() if number in record.kept:
                yield record.at
            case SweepResumed():
                yield record.at


def _was_stopped(at: float, records: list[AnyRecord]) -> bool:
    """Return whether the sweep was stopped at this time and has continued since."""
    marks = [one for one in records if isinstance(one, SweepResumed | SweepEnded)]
    before = [one for one in marks if one.at <= at]
    is_stopped = bool(before) and isinstance(before[-1], SweepEnded) and before[-1].why == "stopped"
    return is_stopped and isinstance(marks[-1], SweepResumed)


def _last_step(view: RunView, share: float) -> int:
    """Return the step, at least 1, at which a share of the run's steps is completed."""
    return max(1, math.ceil(share * view.total_steps))


def _results(view: RunView, rounds: int) -> Iterator[tuple[int, Result]]:
    if not view.total_steps:
        return
    for number in range(1, rounds + 1):
        step = _last_step(view, share_of(number, rounds))
        evaluation = next((e for e in view.evaluations if e.step >= step), None)
        loss = None if evaluation is None else _score(evaluation)
        if evaluation is not None and loss is not None:
            yield number, Result(evaluation.step, _tokens_at(view, evaluation.step), loss)


def _score(event: events.Evaluated) -> float | None:
    value = event.loss if event.score is None else event.score
    return value if value is not None and math.isfinite(value) else None


def _tokens_at(view: RunView, step: int) -> int:
    series = view.series
    return next((tokens for at, tokens in zip(series.step, series.tokens, strict=True) if at >= step), 0)


def _seconds(view: RunView) -> tuple[float, float] | None:
    ending = view.ending
    if not isinstance(ending, events.Finished) or view.started_at is None:
        return None
    # The event only has the time of the last attempt.
    return max(ending.seconds, view.series.seconds()), max(0.0, ending.at - view.started_at - ending.seconds)


def time_left(view: SweepView) -> float:
    """Return the seconds until the deadline, negative after it; infinity if there is none."""
    return math.inf if view.deadline is None else view.deadline - time.time()
