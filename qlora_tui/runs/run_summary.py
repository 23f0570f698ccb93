"""Summaries of runs, one line each, for lists of hundreds, without reading whole logs.

Used in a thread. A summary is cached until the run's status or events change.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.formatting import short_model_name
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.targets import format_rank
from qlora_tui.runs import run_queue
from qlora_tui.runs.defects import ResultDefect, find_defect
from qlora_tui.runs.describe import format_energy
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.directory import all_runs as list_runs
from qlora_tui.runs.events import Failed, Finished, Stopped
from qlora_tui.runs.run_verdict import RunVerdict, gather_evidence, judge_run
from qlora_tui.runs.status import ACTIVE, Status, read_status
from qlora_tui.runs.task_metrics.task_evaluation import read_task_headline
from qlora_tui.runs.view import RunView

_ACTIVE_INTERVAL_S = 5.0
"""Seconds between two reads of an active run's log; its status is read every time."""
_STEPS = 64
"""Steps sampled from a long run; the curve in a list is a few cells wide."""


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run."""

    run: RunDir
    name: str
    """The id, unless the run was renamed."""
    status: Status
    step: int
    """The last completed step."""
    total_steps: int
    """Number of steps; 0 while unknown."""
    loss: float | None
    """Training loss of the last step."""
    queued_at: float
    """Unix time; 0 if the events are missing."""
    started_at: float | None
    """Unix time at which the last attempt began; None before the first."""
    model: str
    settings: str
    """``nf4 r16 2,048×2×8``: the settings in which runs most often differ."""
    best: tuple[float, int] | None
    """Lowest validation loss after training began, and its step."""
    loss_to_beat: float | None
    """Validation loss before training where no later one is lower; None otherwise."""
    accuracy: float | None
    """Exact answers at the last evaluation; None for data without short ones."""
    steps: tuple[int, ...]
    """The steps of ``losses``."""
    losses: tuple[float, ...]
    """Training losses in order, decimated; NaN where one was not a number."""
    seconds: float | None
    """Training time without evaluations and pauses; None before the first step."""
    seconds_left: float | None
    """Remaining time of an active run at its pace; None otherwise."""
    energy: str
    """``0.42 kWh, 3.1 tokens/J``; empty if unknown."""
    fix: str
    """The suggested fix of a failure, in a sentence; empty otherwise."""
    defect: ResultDefect | None = None
    """What is wrong with the result of a run that ended regularly."""
    verdict: RunVerdict | None = None
    """Whether it worked; None for a run without an adapter."""

    @property
    def id(self) -> str:
        return self.run.id


@dataclass(frozen=True)
class Listing:
    """All runs: the active one, then the queue in order, then the newest first."""

    summaries: tuple[RunSummary, ...]
    waiting: tuple[str, ...]
    complete: bool
    """False while only the status has been read of some runs."""


class SummaryCache:
    """Summaries by run, read again only if a file changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, RunSummary]] = {}
        self._read_at: dict[str, float] = {}
        self._runs: dict[str, RunDir] = {}
        self._listed_at = -1

    def get(self, run: RunDir) -> RunSummary:
        """Return the summary of one run. Never raises for a damaged run."""
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
        """Summarize every run in about ``most_s`` seconds; runs not reached have only their status."""
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
        """All runs by id, the newest first; listed again if one was added or removed."""
        changed_at = paths.runs_dir().stat().st_mtime_ns
        if changed_at != self._listed_at:
            self._runs, self._listed_at = {run.id: run for run in list_runs()}, changed_at
            self._known = {name: known for name, known in self._known.items() if name in self._runs}
        return self._runs


def summarize(run: RunDir) -> RunSummary:
    """Read the summary of a run."""
    view, _ = RunView.from_sample(run, _STEPS)
    series = view.series
    ending = view.ending
    best = view.best
    recipe = _readable_recipe(run)
    model, settings = "unknown", "recipe unreadable"
    if recipe is not None:
        model, settings = short_model(recipe), short_settings(recipe)
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
        settings=settings,
        best=(best.loss, best.step) if best is not None and best.loss is not None else None,
        loss_to_beat=view.loss_to_beat,
        accuracy=view.accuracy,
        steps=tuple(series.step),
        losses=tuple(series.loss),
        seconds=series.seconds() if len(series) else None,
        seconds_left=view.seconds_left,
        energy=format_energy(ending) if isinstance(ending, Finished) else "",
        fix=ending.fix if isinstance(ending, Failed) else "",
        defect=find_defect(view),
        verdict=_verdict(view, recipe),
    )


def _verdict(view: RunView, recipe: Recipe | None) -> RunVerdict | None:
    if not isinstance(view.ending, Finished | Stopped) or not view.step:
        return None
    return judge_run(gather_evidence(view, read_task_headline(view.run), recipe))


def _with_heartbeat(summary: RunSummary, status: Status) -> RunSummary:
    if status.step <= summary.step:
        return replace(summary, status=status)
    return replace(summary, status=status, step=status.step, loss=status.loss)


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
        queued_at=0.0,
        started_at=None,
        model="",
        settings="",
        best=None,
        loss_to_beat=None,
        accuracy=None,
        steps=(),
        losses=(),
        seconds=None,
        seconds_left=None,
        energy="",
        fix="",
    )


def _rank(summary: RunSummary, places: Mapping[str, int]) -> int:
    if summary.status.state in ACTIVE:
        return -1
    return places.get(summary.id, len(places))


def _readable_recipe(run: RunDir) -> Recipe | None:
    try:
        return run.recipe()
    except UserError:
        return None


def short_model(recipe: Recipe) -> str:
    """The model's name without the publisher, folder, hash or suffix."""
    return short_model_name(recipe.model.id) or "none"


def short_settings(recipe: Recipe) -> str:
    """``nf4 r16 2,048×2×8``, for a narrow column of a list."""
    training = recipe.training
    batch = f"{recipe.data.max_length:,}×{training.micro_batch_size}×{training.gradient_accumulation}"
    return f"{recipe.quantization.method} {format_rank(recipe.lora)} {batch}"


def _changed_at(run: RunDir) -> int:
    """mtime of the folder, when a file in it was last created or replaced: one stat instead of three.

    Appending events does not change it, but the status or the heartbeat is always replaced afterwards.
    """
    try:
        return run.path.stat().st_mtime_ns
    except OSError:
        return 0
