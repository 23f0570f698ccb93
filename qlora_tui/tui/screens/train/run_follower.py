"""Follows one run for the screen: each poll reads its files and returns a :class:`RunSnapshot`.

The screen polls every ``RUN_POLL_INTERVAL_S`` (``screen.py``).
:class:`RunFollower` is used in a thread, one call at a time. Everything of a size that grows with the run
stays in it; a snapshot holds only what is shown.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import control
from qlora_tui.runs.describe import PhaseFilter, describe, unknown_lines
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.energy import EnergyMeter
from qlora_tui.runs.events import (
    AnyEvent,
    Evaluated,
    Failed,
    Health,
    Progress,
    SampleGenerated,
    Started,
    Step,
)
from qlora_tui.runs.status import Status
from qlora_tui.runs.suggested_fix import SuggestedFix, suggest_fix
from qlora_tui.runs.telemetry import Sample, TelemetryTail
from qlora_tui.runs.view import RunView
from qlora_tui.tui.render.series import BiasCorrectedEma, DecimatedSeries, Envelope
from qlora_tui.tui.screens.train.log_tail import Level, LogEntry
from qlora_tui.tui.screens.train.output_tail import OutputTail

LONG_BYTES = 8 << 20
"""Size of an event log, some 40,000 steps, above which only a sample of the steps is read."""
_SAMPLE_STEPS = 10_000
_RECENT_STEPS = 100
"""Steps that the view keeps, more than its pace is computed from. Earlier ones are kept decimated."""
_MIN_WINDOW, _MAX_WINDOW = 4, 100
_HISTORY = 240
"""Telemetry samples for the charts: four minutes."""
_MAX_ENTRIES = 2000
_MAX_SAMPLES = 60


@dataclass(frozen=True)
class Curves:
    """The curves over steps, decimated."""

    loss: Envelope
    smooth: Envelope
    learning_rate: Envelope
    grad_norm: Envelope
    tokens_per_s: Envelope


@dataclass(frozen=True)
class RunSnapshot:
    """The state of a run at one moment, for the live screen."""

    view: RunView
    """Its single facts are read at once; its columns, of the last steps, belong to the follower."""
    status: Status
    curves: Curves
    step: int
    epoch: float
    losses: tuple[float | None, float | None]
    """The last loss, and the running mean of it."""
    last: tuple[float | None, float | None, float | None]
    """Learning rate, gradient norm and tokens per second of the last step."""
    evaluations: tuple[Evaluated, ...]
    best: Evaluated | None
    samples: tuple[SampleGenerated, ...]
    health: tuple[Health, ...]
    entries: Sequence[LogEntry]
    """Log lines so far; only appended to."""
    output: Sequence[LogEntry]
    """The end of the trainer's own output."""
    telemetry: tuple[Sample, ...]
    """The newest last."""
    energy_kwh: float | None
    seconds_left: float | None
    fix: SuggestedFix | None
    """What one key can do about the latest warning."""
    step_stride: int
    """Steps from one drawn step to the next: more than 1 in a very long run."""
    ending_request: str = ""
    """The request to end the run that waits or was taken: ``stop``, ``pause`` or ``finish_epoch``."""


class _DownsampledRun:
    """A view with its steps decimated to what a graph can show."""

    def __init__(self, view: RunView) -> None:
        self.view = view
        self.history = DecimatedSeries(columns=5)
        self.smoother = BiasCorrectedEma()
        self.last_step = 0
        """The last step that was read."""
        self.step_stride = 1
        """Steps from one kept step to the next; a loss that is not a number is always kept."""
        self._due = 0
        self._drawn: tuple[object, Curves] | None = None

    def read(self) -> list[AnyEvent]:
        """Read new events; returns them without steps, which are too many to hold."""
        events = _without_steps(self.view.iter_new())
        self.add_steps()
        return events

    def add_steps(self) -> None:
        """Add the view's new steps, and leave only recent ones in it."""
        view, series = self.view, self.view.series
        new = self._select(bisect_right(series.step, self.last_step))
        self.smoother.window = smoothing_window(view.total_steps)
        columns = (series.step, series.loss, series.learning_rate, series.grad_norm, series.tokens_per_s)
        steps, loss, *others = ([column[at] for at in new] for column in columns)
        self.history.extend(steps, loss, self.smoother.smooth(loss), *others)
        if len(series):
            self.last_step = series.step[-1]
        series.keep_last(_RECENT_STEPS)
        del view.samples[:-_MAX_SAMPLES]

    def _select(self, first: int) -> list[int]:
        """Which of the view's steps, of those from index ``first`` on."""
        series = self.view.series
        taken = []
        for at in range(first, len(series)):
            if series.step[at] >= self._due or not math.isfinite(series.loss[at]):
                taken.append(at)
                self._due = series.step[at] + self.step_stride
        return taken

    def curves(self, from_step: float) -> Curves:
        """The curves from ``from_step`` on, cached until a step is added."""
        drawn_for = (len(self.history), from_step)
        if self._drawn is None or self._drawn[0] != drawn_for:
            self._drawn = (drawn_for, Curves(*self.history.envelopes(from_step)))
        return self._drawn[1]


def smoothing_window(total_steps: int) -> float:
    """Steps that the running mean looks back over: a thirtieth of the run, so that its trend shows."""
    return float(min(max(total_steps / 30, _MIN_WINDOW), _MAX_WINDOW))


class RunFollower:
    """Reads a run's files from where the last read ended."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.from_step = 0.0
        """Where the graphs begin: more than 0 when zoomed to the end of the run."""
        self._downsampled: _DownsampledRun | None = None
        self._entries: list[LogEntry] = []
        self._event_count = 0
        """Events read so far, without the steps."""
        self._unknown_count = 0
        self._phases = PhaseFilter()
        self._recipe = _recipe(run)
        self._telemetry = TelemetryTail(run.telemetry_path)
        self._recent: deque[Sample] = deque(maxlen=_HISTORY)
        self._energy = EnergyMeter(run.telemetry_path)
        self._output = OutputTail(run.log_path, _MAX_ENTRIES)

    def poll(self) -> RunSnapshot:
        """The run as it is now."""
        self._recent.extend(self._telemetry.poll())
        self._energy.read()
        self._output.read()
        downsampled, events = self._read()
        self._downsampled = downsampled
        self._event_count += len(events)
        fresh = (event for event in events if self._phases.is_new(event))
        self._entries += _entries(fresh, downsampled.view.total_steps)
        self._report_unknown(downsampled.view)
        # A new list, so that whoever shows the old one sees that it was replaced.
        if len(self._entries) > 2 * _MAX_ENTRIES:
            self._entries = self._entries[-_MAX_ENTRIES:]
        return self._snapshot(downsampled)

    def _read(self) -> tuple[_DownsampledRun, list[AnyEvent]]:
        """Read the run, and return the new events except steps."""
        if self._downsampled is None:
            return self._open()
        before = self._downsampled.last_step
        events = self._downsampled.read()
        if any(isinstance(event, Started) and event.resumed_from_step < before for event in events):
            # This attempt does steps again that are thinned already.
            downsampled, all_events = self._open()
            return downsampled, all_events[self._event_count :]
        return self._downsampled, events

    def _report_unknown(self, view: RunView) -> None:
        if view.unknown_events > self._unknown_count:
            self._unknown_count = view.unknown_events
            self._entries.append(LogEntry(view.status.at, "warning", unknown_lines(view.unknown_events)))

    def _open(self) -> tuple[_DownsampledRun, list[AnyEvent]]:
        """Read the run from its beginning; return it and its events without the steps."""
        path = self.run.events_path
        if not path.exists() or path.stat().st_size <= LONG_BYTES:
            downsampled = _DownsampledRun(RunView(self.run))
            return downsampled, downsampled.read()
        view, events = RunView.from_sample(self.run, _SAMPLE_STEPS)
        downsampled = _DownsampledRun(view)
        downsampled.add_steps()
        # So that the steps to come are drawn as densely as those of the sample.
        downsampled.step_stride = max(1, round(downsampled.last_step / max(1, len(downsampled.history))))
        return downsampled, _without_steps(events)

    def _snapshot(self, downsampled: _DownsampledRun) -> RunSnapshot:
        view = downsampled.view
        series = view.series
        last = (
            (series.learning_rate[-1], series.grad_norm[-1], series.tokens_per_s[-1])
            if len(series)
            else (None, None, None)
        )
        return RunSnapshot(
            view=view,
            status=view.status,
            curves=downsampled.curves(self.from_step),
            step=view.step,
            epoch=series.epoch[-1] if len(series) else 0.0,
            losses=(view.loss, downsampled.smoother.mean if len(downsampled.history) else None),
            last=last,
            evaluations=tuple(view.evaluations),
            best=view.best,
            samples=tuple(view.samples),
            health=tuple(view.health),
            entries=self._entries,
            output=self._output.entries,
            telemetry=tuple(self._recent),
            energy_kwh=self._energy.kwh,
            seconds_left=view.seconds_left,
            fix=suggest_fix(view.status.state, view.health, view.ending, self._recipe),
            step_stride=downsampled.step_stride,
            ending_request=control.pending_ending(self.run) or view.requested_ending,
        )


def _recipe(run: RunDir) -> Recipe | None:
    try:
        return run.recipe()
    except UserError:
        return None


def _without_steps(events: Iterable[AnyEvent]) -> list[AnyEvent]:
    return [event for event in events if not isinstance(event, Step)]


def _entries(events: Iterable[AnyEvent], total_steps: int) -> list[LogEntry]:
    """Lines of the log; samples and progress are shown elsewhere."""
    return [
        LogEntry(event.at, _level(event), " ".join(describe(event, total_steps).split()))
        for event in events
        if not isinstance(event, SampleGenerated | Progress)
    ]


def _level(event: AnyEvent) -> Level:
    if isinstance(event, Failed):
        return "error"
    return event.severity if isinstance(event, Health) else "info"
