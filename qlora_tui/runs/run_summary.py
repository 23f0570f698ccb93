"""One-line summaries of runs: state, progress, usability of the result, and whether the run worked.

Lists of hundreds of runs read summaries in a thread, without reading whole logs. A summary is cached until
the run's status or events change.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_tui import paths
from qlora_tui.formatting import (
    format_loss,
    format_loss_change,
    format_percent,
    pluralize,
    short_model_name,
)
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import run_queue
from qlora_tui.runs.describe import forgetting_effect, forgetting_words, format_energy
from qlora_tui.runs.devices import devices_of
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.directory import all_runs as list_runs
from qlora_tui.runs.events import ALL_STEPS_DONE, DataReady, Failed, Finished, Stopped
from qlora_tui.runs.main_settings import MainSetting, main_settings
from qlora_tui.runs.result_weights import is_notably_above
from qlora_tui.runs.status import ACTIVE, State, Status, read_status
from qlora_tui.runs.task_metrics.answer_metrics import Comparison, Metric
from qlora_tui.runs.task_metrics.intervals import MIN_ROWS, Interval, share_interval
from qlora_tui.runs.task_metrics.task_evaluation import LossChange, TaskEvaluation, read_task_evaluation
from qlora_tui.runs.view import RunView, finite_losses

_ENDED_REGULARLY: tuple[State, ...] = ("finished", "stopped", "paused")
WORSE = "worse"
"""Word for a result whose validation loss is higher than before training."""
_FORGETTING_WARNINGS = frozenset(("forgetting", "general_answers"))
_LEARNED: dict[Comparison, str] = {
    "better": "It learned",
    "worse": "It got worse",
    "unclear": "Not enough evidence that it learned",
}
_ACTIVE_INTERVAL_S = 5.0
"""Minimum seconds between two readings of an active run's log. The run's status is read whenever its summary
is requested.
"""
_STEPS = 64
"""Steps sampled from a long run. The curve in a list is only a few cells wide."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Summary of a run."""

    run: RunDir
    name: str
    """The name that the user gave the run, or its id."""
    status: Status
    step: int
    """The last completed step."""
    total_steps: int
    """Number of steps of the run; 0 if unknown."""
    loss: float | None
    """Training loss of the last step."""
    queued_at: float = 0.0
    """Unix time at which the run was queued; 0 if the events are missing."""
    started_at: float | None = None
    """Unix time at which the last attempt began; None before the first."""
    model: str = ""
    data: str = ""
    """Name of the first data file, and the number of other files."""
    devices: str = ""
    """GPUs of the run, such as ``GPU 1 (RTX 3060)``; empty on a machine with a single GPU."""
    settings: tuple[MainSetting, ...] = ()
    """The settings in which runs most often differ; empty if the recipe is unreadable."""
    best: tuple[float, int] | None = None
    """Lowest validation loss since training began, and its step."""
    evaluations: tuple[tuple[int, float], ...] = ()
    """Step and validation loss in order, without losses that were not a number."""
    loss_to_beat: float | None = None
    """Validation loss before training, if no later one is lower; otherwise None."""
    accuracy: float | None = None
    """Share of exact answers at the last evaluation; None for data without short answers."""
    steps: tuple[int, ...] = ()
    """Steps that ``losses`` belong to."""
    losses: tuple[float, ...] = ()
    """Sampled training losses in order; NaN for a loss that was not a number."""
    seconds: float | None = None
    """Training time in seconds, excluding evaluations and pauses; None before the first step."""
    tokens_per_s: float | None = None
    """Tokens per second of training time; None before the first step."""
    peak_bytes: int | None = None
    """Measured memory peak; None if not measured yet."""
    next_evaluation: int = 0
    """Step of the next evaluation; 0 if unknown."""
    seconds_left: float | None = None
    """Remaining seconds of an active run at its current speed; otherwise None."""
    energy: str = ""
    """Energy of a finished run to display, such as ``0.42 kWh, 3.1 tokens/J``; empty if unknown."""
    failure: str = ""
    """Title of a failure, such as ``Out of memory``; otherwise empty."""
    fix: str = ""
    """Suggested fix of a failure, in a sentence; otherwise empty."""
    defect: ResultDefect | None = None
    """Defect of the result of a run that ended regularly."""
    verdict: RunVerdict | None = None
    """Whether the run worked; None unless it finished or was stopped after its first step."""

    @property
    def id(self) -> str:
        return self.run.id

    @property
    def ended_early(self) -> bool:
        """Whether the run finished for a reason other than that all steps were done: before its last step, or
        with early stopping, which takes the adapter from the best step if the checkpoint of this step is
        intact. In the latter case, the reason says which step the adapter is from.
        """
        return self.status.state == "finished" and self.status.detail not in ("", ALL_STEPS_DONE)


@dataclass(frozen=True)
class Listing:
    """All runs: the active ones, then the queue in order, then all others from newest to oldest."""

    summaries: tuple[RunSummary, ...]
    waiting: tuple[str, ...]
    complete: bool
    """Whether all summaries were read. False if for some runs only the status was read."""


class SummaryCache:
    """Summaries by run, which are read again only if a file changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, RunSummary]] = {}
        self._read_at: dict[str, float] = {}
        self._runs: dict[str, RunDir] = {}
        self._listed_at = -1

    def get(self, run: RunDir) -> RunSummary:
        """Return the summary of a run. Never raises, even for a damaged run."""
        key = _changed_at(run)
        now = time.monotonic()
        known = self._known.get(run.id)
        if known is not None:
            is_active = known[1].status.state in ACTIVE
            if known[0] == key and not is_active:
                return known[1]
            if is_active and now - self._read_at[run.id] < _ACTIVE_INTERVAL_S:
                status = read_status(run)
                if status.state in ACTIVE:
                    return _with_heartbeat(known[1], status)
        summary = summarize(run)
        self._known[run.id], self._read_at[run.id] = (key, summary), now
        return summary

    def read_all(self, most_s: float) -> Listing:
        """Summarize all runs in about ``most_s`` seconds. Runs not reached in time have only their status."""
        until = time.monotonic() + most_s
        runs = self.all_runs()
        waiting = tuple(name for name in run_queue.waiting() if name in runs)
        places = {name: place for place, name in enumerate(waiting)}
        ordered = [runs[name] for name in waiting] + [run for name, run in runs.items() if name not in places]
        summaries, complete = [], True
        for run in ordered:
            in_time = time.monotonic() < until
            complete = complete and (in_time or run.id in self._known)
            summaries.append(self.get(run) if in_time or run.id in self._known else outline(run))
        summaries.sort(key=lambda summary: _rank(summary, places))
        return Listing(tuple(summaries), waiting, complete)

    def all_runs(self) -> dict[str, RunDir]:
        """Return all runs by id, newest first. The folder is listed again if a run was added or removed."""
        changed_at = paths.runs_dir().stat().st_mtime_ns
        if changed_at != self._listed_at:
            self._runs, self._listed_at = {run.id: run for run in list_runs()}, changed_at
            self._known = {name: known for name, known in self._known.items() if name in self._runs}
        return self._runs


def _with_heartbeat(summary: RunSummary, status: Status) -> RunSummary:
    if status.step <= summary.step:
        return replace(summary, status=status)
    return replace(summary, status=status, step=status.step, loss=status.loss)


def _rank(summary: RunSummary, places: Mapping[str, int]) -> int:
    if summary.status.state in ACTIVE:
        return -1
    return places.get(summary.id, len(places))


def _changed_at(run: RunDir) -> int:
    """Return the mtime of the run's folder, at which a file in it was last created or replaced.

    This takes one stat call instead of three. Appending events does not change it, but the status or
    heartbeat is always replaced afterwards.
    """
    try:
        return run.path.stat().st_mtime_ns
    except OSError:
        return 0


def summarize(run: RunDir) -> RunSummary:
    """Return the summary of a run, read from its files."""
    view, _ = RunView.from_sample(run, _STEPS)
    series = view.series
    ending = view.ending
    best = view.best
    recipe = run.readable_recipe()
    model, data, settings = "unknown", "", tuple[MainSetting, ...]()
    if recipe is not None:
        model, settings = short_model_name(recipe.model.id) or "none", main_settings(recipe)
        data = data_words(recipe)
    seconds = series.seconds() if len(series) else None
    return RunSummary(
        run=run,
        name=run.name,
        status=view.status,
        step=view.step,
        total_steps=view.total_steps,
        loss=view.loss,
        queued_at=view.queued_at or 0.0,
        started_at=view.started_at,
        model=model,
        data=data,
        devices=device_words(run),
        settings=settings,
        best=(best.loss, best.step) if best is not None and best.loss is not None else None,
        evaluations=finite_losses(view.evaluations),
        loss_to_beat=view.loss_to_beat,
        accuracy=view.accuracy,
        steps=tuple(series.step),
        losses=tuple(series.loss),
        seconds=seconds,
        next_evaluation=next_evaluation(recipe, view.data, view.step, last_evaluation(view)),
        tokens_per_s=series.tokens[-1] / seconds if seconds else None,
        peak_bytes=None if view.memory is None else view.memory.measured_bytes,
        seconds_left=view.seconds_left,
        energy=format_energy(ending) if isinstance(ending, Finished) else "",
        failure=ending.title if isinstance(ending, Failed) else "",
        fix=ending.fix if isinstance(ending, Failed) else "",
        defect=find_defect(view),
        verdict=find_verdict(view, recipe),
    )


def device_words(run: RunDir) -> str:
    """Return the names of a run's current or last GPUs; empty on a machine with a single GPU."""
    devices = devices_of(run)
    return str(devices) if devices is not None and devices.is_choice else ""


def last_evaluation(view: RunView) -> int:
    """Return the step of the last evaluation; 0 before the first."""
    return view.evaluations[-1].step if view.evaluations else 0


def next_evaluation(recipe: Recipe | None, data: DataReady | None, step: int, evaluated: int) -> int:
    """Return the step of the next evaluation; 0 if it is unknown, or before the first step.

    Args:
        recipe: The run's recipe.
        data: The run's data.
        step: The last step. Its own evaluation may be in progress.
        evaluated: The step of the last evaluation.
    """
    if recipe is None or data is None or not data.validation_samples or not step:
        return 0
    every = recipe.training.eval_every or data.steps_per_epoch
    if not every:
        return 0
    if evaluated < step and (step % every == 0 or step == data.total_steps):
        return step
    following = min((step // every + 1) * every, data.total_steps)
    return following if following > step else 0


def outline(run: RunDir) -> RunSummary:
    """Summarize a run from its status alone."""
    status = read_status(run)
    return RunSummary(
        run=run,
        name=run.name,
        status=status,
        step=status.step,
        total_steps=status.total_steps,
        loss=status.loss,
    )


def find_verdict(view: RunView, recipe: Recipe | None) -> RunVerdict | None:
    """Return whether an ended run has learned; None if it has not ended or has trained no step."""
    if not isinstance(view.ending, Finished | Stopped) or not view.step:
        return None
    return judge_run(gather_evidence(view, read_task_evaluation(view.run), recipe))


@dataclass(frozen=True)
class ResultDefect:
    """A defect of a run's result."""

    word: str
    """At most ten characters for lists, such as ``NaN loss`` or ``worse``."""
    sentence: str


def find_defect(view: RunView) -> ResultDefect | None:
    """Return the defect of a run's result; None if it has none, or the run did not end regularly."""
    if view.status.state not in _ENDED_REGULARLY or view.loss is None:
        return None
    last = view.last_evaluation
    if math.isnan(view.loss) or (last is not None and last.loss is None):
        step = next((health.step for health in view.health if health.kind == "nan_loss"), None)
        since = "" if step is None else f" (first at step {step:,})"
        return ResultDefect("NaN loss", f"The loss is not a number{since}.")
    before = view.loss_before_training
    if last is not None and last.step and last.loss is not None and before is not None and last.loss > before:
        return ResultDefect(
            WORSE,
            f"The validation loss is {format_loss(last.loss)} at step {last.step:,}; before training it "
            f"was {format_loss(before)}.",
        )
    return None


@dataclass(frozen=True)
class RunVerdict:
    """The verdict on a run: whether it worked, and a sentence that says so."""

    outcome: Comparison
    sentence: str
    cautions: tuple[str, ...] = ()
    """Parts of the sentence that are warnings, such as ``best at step 640, worse since``."""
    has_answers: bool = False
    """Whether answers were measured."""
    has_improved: bool = False
    """Whether the first figure of the sentence improved, even if only by chance."""
    lacks_rows: bool = False
    """Whether only mean losses are known, so that a comparison by row would say more."""
    has_only_losses: bool = False
    """Whether the sentence only gives a validation loss before training, and a lower one after it."""


@dataclass(frozen=True, kw_only=True)
class RunEvidence:
    """Everything that is known about a run's result."""

    preferences: PreferenceAccuracy | None = None
    """Replaces the loss for preference methods whose loss does not measure the likelihood of answers."""
    loss: LossChange | None = None
    """Validation loss with its confidence interval; None for runs of earlier versions, or without validation
    data.
    """
    losses: tuple[float, float | None] | None = None
    """Validation loss before and after training, without confidence intervals; None if not measured."""
    best_step: int | None = None
    """Step of the lowest validation loss, if the loss has risen clearly since; None otherwise."""
    forgetting: float | None = None
    """Divergence from the base on general prompts, in nats; None if not measured."""
    turn_ends: float | None = None
    """Share of turn ends that the model still predicts, in the base's answers to general prompts; None if not
    measured.
    """
    forgot_much: bool = False
    """Whether the run had a warning about forgetting."""
    metric: Metric | None = None
    """The first metric of the answers; None if they were not measured."""

    @property
    def change(self) -> tuple[float, float] | None:
        """Validation loss before and after training; None if it was not measured."""
        if self.loss is not None and self.loss.rows:
            return self.loss.before, self.loss.after
        before, after = self.losses or (0.0, None)
        return None if after is None else (before, after)


@dataclass(frozen=True)
class PreferenceAccuracy:
    """How often the better answer wins, on the validation data of a preference run."""

    right: float
    """Share of comparisons that the better answer wins."""
    rows: int
    """Number of pairs or rated answers."""
    unit: str
    """``pair`` or ``answer``."""
    expected: float
    """Share of comparisons that the better answer is expected to win before training."""
    is_measured: bool = False
    """Whether ``expected`` was measured on the same data, and therefore has an interval too."""

    @property
    def outcome(self) -> Comparison:
        """How ``right`` compares with ``expected``; unclear if their 95 % intervals overlap, or there are too
        few rows.
        """
        now = self._interval(self.right)
        start = self._interval(self.expected) if self.is_measured else Interval(self.expected, self.expected)
        if self.rows < MIN_ROWS or (now.low <= start.high and now.high >= start.low):
            return "unclear"
        return "better" if now.low > start.high else "worse"

    def _interval(self, share: float) -> Interval:
        return share_interval(round(share * self.rows), self.rows)


def gather_evidence(view: RunView, evaluation: TaskEvaluation | None, recipe: Recipe | None) -> RunEvidence:
    """Return the evidence in a run's events and in the evaluation of its answers.

    Args:
        view: The run.
        evaluation: Evaluation of the run's answers; None if there is none.
        recipe: Recipe of the run; None if it cannot be read.
    """
    preferences = None if recipe is None or recipe.learns_answers else _preference_accuracy(view, recipe)
    # An evaluation has the loss of answers, and compares it with the base.
    counts = recipe is None or (recipe.learns_answers and not recipe.lora.init_from)
    loss = evaluation.loss if evaluation is not None and counts else None
    if (change := view.validation_change) is not None:
        loss = LossChange(
            rows=change.rows,
            before=change.before,
            after=change.after,
            interval=None if change.low is None or change.high is None else Interval(change.low, change.high),
        )
    before, last = view.loss_before_training, view.trained_evaluation
    losses = finite_losses(each for each in view.evaluations if each.step)
    best_step, lowest = min(losses, key=lambda each: each[1], default=(0, math.inf))
    is_worse = bool(losses) and is_notably_above(losses[-1][1], lowest)
    return RunEvidence(
        preferences=preferences,
        loss=loss,
        losses=None if before is None else (before, None if last is None else last.loss),
        best_step=best_step if is_worse else None,
        forgetting=None if last is None else last.forgetting,
        turn_ends=None if last is None else last.general_turn_ends,
        forgot_much=any(health.kind in _FORGETTING_WARNINGS for health in view.health),
        metric=evaluation.metrics[0] if evaluation is not None and evaluation.metrics else None,
    )


def _preference_accuracy(view: RunView, recipe: Recipe) -> PreferenceAccuracy | None:
    """Return how often the better answer wins at the last evaluation; None without a comparison."""
    last, traits = view.trained_evaluation, recipe.preference_traits
    if last is None or view.data is None or traits is None:
        return None
    first, rows = view.evaluations[0], view.data.validation_samples
    right = last.reward_accuracy
    start = None if first.step else first.reward_accuracy
    if right is None or not rows:
        return None
    begins_at_0 = traits.uses_reference
    if begins_at_0 and not traits.rates_answers:
        # Before training, all rewards are 0, and no pair is in the right order.
        return PreferenceAccuracy(right, rows, "pair", 0.5)
    if start is None:
        return None
    if begins_at_0:
        # A reward of 0 is right for bad answers, so giving all answers the same rating is no learning.
        return PreferenceAccuracy(right, rows, "answer", max(start, 1 - start))
    return PreferenceAccuracy(right, rows, "pair", start, is_measured=True)


def judge_run(evidence: RunEvidence) -> RunVerdict:
    """Return the verdict. Answers count more than the loss. Without either, the verdict is unclear."""
    metric, preferences, loss = evidence.metric, evidence.preferences, evidence.loss
    change = evidence.change
    outcome: Comparison = "unclear"
    if metric is not None and metric.comparison != "unclear":
        outcome = metric.comparison
    elif preferences is not None:
        outcome = preferences.outcome
    elif loss is not None and (loss.is_lower or loss.is_higher):
        outcome = "better" if loss.is_lower else "worse"
    learned = _loss_words(evidence) if preferences is None else _preference_words(preferences)
    risen = "" if evidence.best_step is None else f"best at step {evidence.best_step:,}, worse since"
    forgot = _forgetting_words(evidence)
    warning = forgot if evidence.forgot_much else ""
    parts = list(filter(None, (learned, risen, forgot, _metric_words(metric))))
    lacks_rows = preferences is None and change is not None and not (loss and loss.rows)
    return RunVerdict(
        outcome,
        f"{'; '.join(parts)}.",
        cautions=tuple(filter(None, (risen, warning))),
        has_answers=metric is not None,
        has_improved=(
            preferences.right > preferences.expected
            if preferences is not None
            else change is not None and change[1] < change[0]
        ),
        lacks_rows=lacks_rows,
        has_only_losses=lacks_rows and len(parts) == 1 and change is not None and change[1] < change[0],
    )


def _preference_words(preferences: PreferenceAccuracy) -> str:
    without = f"{format_percent(preferences.expected)} {'before' if preferences.is_measured else 'by chance'}"
    compared = pluralize(preferences.rows, f"validation {preferences.unit}")
    return (
        f"{_LEARNED[preferences.outcome]}: {format_percent(preferences.right)} of {compared} right, {without}"
    )


def _loss_words(evidence: RunEvidence) -> str:
    loss = evidence.loss
    if loss is None or not loss.rows:
        if evidence.losses is None:
            return f"{_LEARNED['unclear']}: no validation data"
        before, after = evidence.losses
        if after is None:
            return "Too early to tell: validation was measured only before training"
        if after < before:
            return f"Validation loss fell from {format_loss(before)} to {format_loss(after)}"
        return f"{_LEARNED['unclear']}: validation loss {format_loss(before)} → {format_loss(after)}"
    # The rows compared may be fewer than those of an evaluation. The sentence has no loss of theirs, which
    # would differ from the losses on the chart.
    interval, compared = loss.interval, pluralize(loss.rows, "row")
    if interval is None or loss.rows < MIN_ROWS:
        return f"{_LEARNED['unclear']}: only {compared} compared"
    if not (loss.is_lower or loss.is_higher):
        change = f"{format_loss_change(interval.low)} to {format_loss_change(interval.high)}"
        moved = format_loss_change(loss.after - loss.before)
        return f"{_LEARNED['unclear']}: validation loss changed by {moved} (95%: {change}; {compared})"
    low, high = sorted((abs(interval.low), abs(interval.high)))
    outcome: Comparison = "better" if loss.is_lower else "worse"
    moved = f"{'fell' if loss.is_lower else 'rose'} by {format_loss(abs(loss.after - loss.before))}"
    size = f"95%: {format_loss(low)} to {format_loss(high)}"
    return f"{_LEARNED[outcome]}: validation loss {moved} ({size}; {compared})"


def _forgetting_words(evidence: RunEvidence) -> str:
    """Return how much the model forgot, such as ``forgetting 0.31 of 2`` or, if the run has a warning about
    forgetting, what has changed in its answers to general prompts. Empty if neither is known.
    """
    if evidence.forgetting is None:
        return "much forgetting" if evidence.forgot_much else ""
    if evidence.forgot_much:
        return forgetting_effect(evidence.forgetting, evidence.turn_ends)
    return forgetting_words(evidence.forgetting)


def _metric_words(metric: Metric | None) -> str:
    if metric is None:
        return ""
    values = f"{metric.name} {format_percent(metric.adapter)}, base {format_percent(metric.base)}"
    if metric.comparison == "better":
        return f"answers better: {values}"
    if metric.comparison == "worse":
        return f"answers worse: {values}"
    return f"answers not clearly better: {values} on {pluralize(metric.rows, 'prompt')}"


def data_words(recipe: Recipe) -> str:
    """Return the name of the first data file, and the number of other files."""
    sources = recipe.data.sources
    if not sources:
        return "no data"
    more = f" +{len(sources) - 1}" if len(sources) > 1 else ""
    return Path(sources[0].path).name + more
