"""A run in a line: what a list of hundreds, and Home, say of each without reading it whole.

Used in a thread. What was read of a run is kept until its status or its events change.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.targets import format_rank
from qlora_tui.runs import run_queue
from qlora_tui.runs.describe import format_energy
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.directory import all_runs as list_runs
from qlora_tui.runs.events import Failed, Finished
from qlora_tui.runs.status import ACTIVE, Status, read_status
from qlora_tui.runs.view import RunView

_ACTIVE_INTERVAL_S = 5.0
"""Between two readings of a run at work; its status is read every time."""
_STEPS = 64
"""Of a long run; the curve of a list is a few cells wide."""


@dataclass(frozen=True)
class RunSummary:
    """What is known of a run at a glance."""

    run: RunDir
    name: str
    """What it is called: its id, unless it was renamed."""
    status: Status
    step: int
    """The last one done."""
    total_steps: int
    """0 before it is known."""
    loss: float | None
    """Of the last step, in training."""
    queued_at: float
    """Unix time; 0 where the events are gone."""
    model: str
    settings: str
    """``nf4 r16 2,048×2×8``: what most often differs between two runs."""
    best: tuple[float, int] | None
    """Lowest validation loss after training began, and its step."""
    accuracy: float | None
    """Exact answers at the last validation; None for data without short ones."""
    losses: tuple[float, ...]
    """Training losses from first to last, thinned; NaN where one was not a number."""
    seconds: float | None
    """Of training, without validations and pauses; None before there is a step."""
    seconds_left: float | None
    """Of a run at work, by its pace; None where there is none."""
    energy: str
    """``0.42 kWh, 3.1 tokens/J``; empty where it is not known."""
    fix: str
    """What to do about its failure, in a sentence; empty where there is none, or nothing was said."""

    @property
    def id(self) -> str:
        return self.run.id


@dataclass(frozen=True)
class Listing:
    """All runs: those that wait in their order, then those at work, then the newest first."""

    summaries: tuple[RunSummary, ...]
    waiting: tuple[str, ...]
    complete: bool
    """False while some have only their status."""


class SummaryCache:
    """Summaries by run, read again only where a file changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, RunSummary]] = {}
        self._read_at: dict[str, float] = {}
        self._runs: dict[str, RunDir] = {}
        self._listed_at = -1

    def get(self, run: RunDir) -> RunSummary:
        """The summary of one run. Never raises for a strange run."""
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
        """Every run, in about so many seconds: what was not come to in time has only its status yet."""
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
        """Every run by its id, the newest first; listed again where one came or went."""
        changed_at = paths.runs_dir().stat().st_mtime_ns
        if changed_at != self._listed_at:
            self._runs, self._listed_at = {run.id: run for run in list_runs()}, changed_at
            self._known = {name: known for name, known in self._known.items() if name in self._runs}
        return self._runs


def summarize(run: RunDir) -> RunSummary:
    """Read what a line says of a run."""
    view, _ = RunView.from_sample(run, _STEPS)
    series = view.series
    ending = view.ending
    best = view.best
    model, settings = _recipe_words(run)
    return RunSummary(
        run=run,
        name=run.name,
        status=view.status,
        step=view.step,
        total_steps=view.total_steps,
        loss=view.loss,
        queued_at=view.queued_at or 0.0,
        model=model,
        settings=settings,
        best=(best.loss, best.step) if best is not None and best.loss is not None else None,
        accuracy=view.accuracy,
        losses=tuple(series.loss),
        seconds=series.seconds() if len(series) else None,
        seconds_left=view.seconds_left,
        energy=format_energy(ending) if isinstance(ending, Finished) else "",
        fix=ending.fix if isinstance(ending, Failed) else "",
    )


def _with_heartbeat(summary: RunSummary, status: Status) -> RunSummary:
    if status.step <= summary.step:
        return replace(summary, status=status)
    return replace(summary, status=status, step=status.step, loss=status.loss)


def outline(run: RunDir) -> RunSummary:
    """What its status alone says."""
    status = read_status(run)
    return RunSummary(
        run=run,
        name=run.name,
        status=status,
        step=status.step,
        total_steps=status.total_steps,
        loss=status.loss,
        queued_at=0.0,
        model="",
        settings="",
        best=None,
        accuracy=None,
        losses=(),
        seconds=None,
        seconds_left=None,
        energy="",
        fix="",
    )


def _rank(summary: RunSummary, places: Mapping[str, int]) -> int:
    place = places.get(summary.id)
    return len(places) + (summary.status.state not in ACTIVE) if place is None else place


def _recipe_words(run: RunDir) -> tuple[str, str]:
    try:
        recipe = run.recipe()
    except UserError:
        return "unknown", "recipe unreadable"
    return short_model(recipe), short_settings(recipe)


def short_model(recipe: Recipe) -> str:
    """Without the publisher."""
    return recipe.model.id.rstrip("/").rpartition("/")[2] or "none"


def short_settings(recipe: Recipe) -> str:
    """``nf4 r16 2,048×2×8``."""
    training = recipe.training
    batch = f"{recipe.data.max_length:,}×{training.micro_batch_size}×{training.gradient_accumulation}"
    return f"{recipe.quantization.method} {format_rank(recipe.lora)} {batch}"


def _changed_at(run: RunDir) -> int:
    """When a file of a run was last replaced or made, by its folder's time: one look at the disk, not three.

    Events are appended without that, but never without the status or the heartbeat being replaced after them.
    """
    try:
        return run.path.stat().st_mtime_ns
    except OSError:
        return 0
