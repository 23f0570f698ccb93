"""Follows one run for the screen: each poll reads the run's files and returns a :class:`RunSnapshot`.

:class:`RunFollower` is called in a thread, one call at a time. The follower keeps all data that grows with
the run; a snapshot has only the data to show.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import control
from qlora_tui.runs.describe import PhaseFilter, current_health, describe, exceeds_estimate, unknown_lines
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import LineTail, end_offset
from qlora_tui.runs.events import (
    STEP_PHASES,
    AnyEvent,
    Evaluated,
    Failed,
    Health,
    MemoryMeasured,
    PhaseChanged,
    Progress,
    SampleGenerated,
    Started,
    Step,
)
from qlora_tui.runs.run_summary import RunVerdict, find_verdict
from qlora_tui.runs.status import ACTIVE, Status
from qlora_tui.runs.suggested_fix import SuggestedFix, suggest_fix
from qlora_tui.runs.telemetry import EnergyMeter, Reading, TelemetryTail
from qlora_tui.runs.view import RunView
from qlora_tui.tui.render.series import (
    DecimatedSeries,
    Envelope,
    local_fits,
    smoothing_window,
)

LONG_BYTES = 8 << 20
"""Size of an event log, in bytes, above which only a sample of the steps is read. A log of this size has
about 40,000 steps.
"""
_SAMPLE_STEPS = 10_000
"""Number of steps that are read from an event log of more than :data:`LONG_BYTES`."""
_RECENT_STEPS = 100
"""Number of recent steps to keep in the :class:`RunView`. Fewer steps would be enough to compute the pace.
Earlier steps are kept only in a decimated series.
"""
_FIT_WINDOWS = 8
"""Number of smoothing windows to include before the start of a curve. The steps in these windows also take
part in the fit of the smoothed loss.
"""
_MAX_READINGS = 240
"""Maximum number of telemetry readings for the charts. They cover four minutes."""
_MAX_ENTRIES = 2000
_MAX_STAGES = 12
"""Maximum number of phases that are kept for an attempt. Later phases are dropped. The limit is higher
than the number of phases before the first step.
"""
_MAX_ANSWERS = 60
"""Maximum number of answers to sample prompts that are kept."""
_OUTPUT_BYTES = 128 << 10
"""Number of bytes at the end of the trainer's output that the first read covers."""
_MAX_CHARACTERS = 10_000
"""Maximum length of a displayed line of output, in characters."""
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


Level: TypeAlias = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class LogEntry:
    """A line of the log."""

    at: float | None
    """Unix time of the event; None for a line without a time."""
    level: Level
    text: str


@dataclass(frozen=True)
class StepEnvelopes:
    """The curves of a run's quantities over its steps, for drawing."""

    loss: Envelope
    mean_loss: Envelope
    """Smoothed loss, without lag."""
    learning_rate: Envelope
    grad_norm: Envelope
    tokens_per_s: Envelope
    reward_margin: Envelope


@dataclass(frozen=True)
class RunSnapshot:
    """The state of a run at one moment, for the live screen."""

    view: RunView
    """View of the run. The screen may use only its scalar fields, because the follower's thread changes its
    columns.
    """
    status: Status
    envelopes: StepEnvelopes
    step: int
    epoch: float
    loss: float | None
    """Loss of the last step; None before the first step. The next five fields also refer to the last step."""
    mean_loss: float | None
    """Smoothed loss at the last step: the last value of the smoothed curve."""
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_s: float | None
    reward_margin: float
    """Margin of the rewards; NaN before the first step, and if the run uses no preference method."""
    evaluations: tuple[Evaluated, ...]
    best: Evaluated | None
    samples: tuple[SampleGenerated, ...]
    health: tuple[Health, ...]
    entries: Sequence[LogEntry]
    """The log so far. New entries are appended, and existing entries never change."""
    output: Sequence[LogEntry]
    """Lines from the end of the trainer's own output."""
    telemetry: tuple[Reading, ...]
    """Readings of the machine, newest last."""
    energy_kwh: float | None
    seconds_trained: float
    """Training time over all steps, excluding evaluations and pauses."""
    seconds_left: float | None
    seconds_per_step: float | None
    """Duration of a recent step in seconds; None until it is known."""
    fix: SuggestedFix | None
    """The fix that a single key applies, for the latest warning or failure that has such a fix; None if no
    warning or failure has one.
    """
    step_stride: int
    """Distance between neighboring points of the graph, in steps; more than 1 only in a very long run."""
    stages: tuple[PhaseChanged, ...] = ()
    """The phases of the current attempt, at most ``_MAX_STAGES`` from its start."""
    recipe: Recipe | None = None
    """The run's recipe; None if it cannot be read."""
    ending_request: str = ""
    """The pending or accepted request to end the run, one of ``control.ENDINGS``; empty if there is none."""
    verdict: RunVerdict | None = None
    """Verdict on whether an ended run has learned."""

    @property
    def is_stopping(self) -> bool:
        """Whether the run has been asked to stop, and has not yet finished its current step, evaluation or
        checkpoint.
        """
        is_asked = self.ending_request in ("stop", "stop_now")
        return is_asked and self.status.state in ACTIVE and self.view.phase in STEP_PHASES

    @property
    def is_best_saved(self) -> bool:
        """Whether the step with the best evaluation has a checkpoint. The trainer keeps that checkpoint."""
        return self.best is not None and any(saved.step == self.best.step for saved in self.view.checkpoints)

    @property
    def has_validation(self) -> bool:
        """Whether the run has validation data. True if this is not known yet."""
        return self.view.data is None or bool(self.view.data.validation_samples)


class _DecimatedRun:
    """A view of a run that keeps only recent steps, and a decimated series of all steps for the graphs."""

    def __init__(self, view: RunView) -> None:
        self.view = view
        self.steps = DecimatedSeries(columns=6)
        """Columns: loss, step, learning rate, gradient norm, tokens per second, reward margin."""
        self.last_step = 0
        """The last step that was read."""
        self.seconds_trained = 0.0
        """Training time of all steps that were read."""
        self.step_stride = 1
        """Minimum distance from one kept step to the next, in steps. Steps with a loss that is not finite are
        always kept.
        """
        self.mean_loss: float | None = None
        """Smoothed loss at the last step, set by ``envelopes``; None before the first step."""
        self._due = 0
        self._drawn: tuple[object, StepEnvelopes] | None = None

    def read(self) -> list[AnyEvent]:
        """Read new events. Add the steps to the decimated series, and return all other events."""
        events = _without_steps(self.view.iter_new())
        self.add_steps()
        return events

    def add_steps(self) -> None:
        """Add the view's new steps to the decimated series. Keep only recent steps and answers in the
        view.
        """
        view, series = self.view, self.view.series
        first = bisect_right(series.step, self.last_step)
        self.seconds_trained += series.seconds(first)
        new = self._select(first)
        columns = (
            series.step,
            series.loss,
            series.learning_rate,
            series.grad_norm,
            series.tokens_per_s,
            series.reward_margin,
        )
        steps, loss, *others = ([column[at] for at in new] for column in columns)
        self.steps.extend(steps, loss, steps, *others)
        if len(series):
            self.last_step = series.step[-1]
        series.keep_last(_RECENT_STEPS)
        del view.samples[:-_MAX_ANSWERS]

    def _select(self, first: int) -> list[int]:
        """Return the indices, in the view's series, of the steps to add to the decimated series. Steps before
        index ``first`` are ignored.
        """
        series = self.view.series
        taken = []
        for at in range(first, len(series)):
            if series.step[at] >= self._due or not math.isfinite(series.loss[at]):
                taken.append(at)
                self._due = series.step[at] + self.step_stride
        return taken

    def envelopes(self, from_step: float) -> StepEnvelopes:
        """Return the curves, beginning at step ``from_step``. The result is cached until a step is added or
        ``from_step`` changes.
        """
        drawn_for = (len(self.steps), from_step)
        if self._drawn is None or self._drawn[0] != drawn_for:
            envelopes, whole = StepEnvelopes(*self.steps.envelopes(from_step)), self._smoothed(0.0)
            self.mean_loss = whole.means[-1] if whole.means else None
            mean_loss = self._smoothed(from_step) if from_step else whole
            self._drawn = (drawn_for, replace(envelopes, mean_loss=mean_loss))
        return self._drawn[1]

    def _smoothed(self, from_step: float) -> Envelope:
        """Return the smoothed loss, beginning at step ``from_step``. Smoothing also uses earlier steps."""
        steps_per_value = max(1.0, self.last_step / max(1, len(self.steps)))
        window = smoothing_window(self.view.total_steps) * steps_per_value
        loss, step, *_ = self.steps.envelopes(from_step - _FIT_WINDOWS * window)
        fits = local_fits(
            step.means,
            loss.means,
            window,
            weights=[
                last - first + steps_per_value for first, last in zip(step.lows, step.highs, strict=True)
            ],
            at=loss.xs,
        )
        begin = bisect_left(loss.xs, from_step)
        return replace(Envelope.of_points(loss.xs[begin:], fits[begin:]), means=tuple(fits[begin:]))


class RunFollower:
    """Reads a run's files, continuing where the last read ended."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.from_step = 0.0
        """Step at which the graphs begin; 0 unless the user has zoomed in to the end of the run."""
        self._decimated_run: _DecimatedRun | None = None
        self._entries: list[LogEntry] = []
        self._event_count = 0
        """Number of events read so far, not counting steps."""
        self._unknown_count = 0
        self._phases = PhaseFilter()
        self._stages: list[PhaseChanged] = []
        self._recipe = run.readable_recipe()
        self._telemetry = TelemetryTail(run.telemetry_path)
        self._readings: deque[Reading] = deque(maxlen=_MAX_READINGS)
        self._energy = EnergyMeter(run.telemetry_path)
        self._output = OutputTail(run.log_path, _MAX_ENTRIES)

    def poll(self) -> RunSnapshot:
        """Read what was appended to the run's files, and return the run's current state."""
        self._readings.extend(self._telemetry.poll())
        self._energy.read()
        self._output.read()
        decimated_run, events = self._read()
        self._decimated_run = decimated_run
        self._event_count += len(events)
        for event in events:
            if isinstance(event, Started):
                self._stages.clear()
            elif isinstance(event, PhaseChanged) and len(self._stages) < _MAX_STAGES:
                self._stages.append(event)
        fresh = [event for event in events if self._phases.is_new(event)]
        self._entries += _entries(fresh, decimated_run.view.total_steps)
        view = decimated_run.view
        if view.unknown_events > self._unknown_count:
            self._unknown_count = view.unknown_events
            self._entries.append(LogEntry(view.status.at, "warning", unknown_lines(view.unknown_events)))
        # Replace the list instead of shortening it, so that a widget that shows the old list notices the
        # change.
        if len(self._entries) > 2 * _MAX_ENTRIES:
            self._entries = self._entries[-_MAX_ENTRIES:]
        return self._snapshot(decimated_run)

    def _read(self) -> tuple[_DecimatedRun, list[AnyEvent]]:
        """Read the run's new events. Return the run, and all new events that are not steps."""
        if self._decimated_run is None:
            return self._open()
        before = self._decimated_run.last_step
        events = self._decimated_run.read()
        if any(isinstance(event, Started) and event.resumed_from_step < before for event in events):
            # The new attempt repeats steps that are already in the decimated series: read the run again.
            decimated_run, all_events = self._open()
            return decimated_run, all_events[self._event_count :]
        return self._decimated_run, events

    def _open(self) -> tuple[_DecimatedRun, list[AnyEvent]]:
        """Read the run from the beginning, or a sample of its steps if the event log is long. Return the run,
        and all of its events that are not steps.
        """
        path = self.run.events_path
        if not path.exists() or path.stat().st_size <= LONG_BYTES:
            decimated_run = _DecimatedRun(RunView(self.run))
            return decimated_run, decimated_run.read()
        view, events = RunView.from_sample(self.run, _SAMPLE_STEPS)
        decimated_run = _DecimatedRun(view)
        decimated_run.add_steps()
        # Keep later steps at the same density as the steps of the sample.
        decimated_run.step_stride = max(1, round(decimated_run.last_step / max(1, len(decimated_run.steps))))
        return decimated_run, _without_steps(events)

    def _snapshot(self, decimated_run: _DecimatedRun) -> RunSnapshot:
        view = decimated_run.view
        series, health = view.series, current_health(view)
        envelopes = decimated_run.envelopes(self.from_step)
        return RunSnapshot(
            view=view,
            status=view.status,
            envelopes=envelopes,
            step=view.step,
            epoch=series.epoch[-1] if len(series) else 0.0,
            loss=view.loss,
            mean_loss=decimated_run.mean_loss,
            learning_rate=series.learning_rate[-1] if len(series) else None,
            grad_norm=series.grad_norm[-1] if len(series) else None,
            tokens_per_s=series.tokens_per_s[-1] if len(series) else None,
            reward_margin=series.reward_margin[-1] if len(series) else math.nan,
            evaluations=tuple(view.evaluations),
            best=view.best,
            samples=tuple(view.samples),
            health=health,
            entries=self._entries,
            output=self._output.entries,
            telemetry=tuple(self._readings),
            energy_kwh=self._energy.kwh,
            seconds_trained=decimated_run.seconds_trained,
            seconds_left=view.seconds_left,
            seconds_per_step=view.seconds_per_step,
            fix=suggest_fix(view.status.state, health, view.ending, self._recipe, view.plan),
            step_stride=decimated_run.step_stride,
            stages=tuple(self._stages),
            recipe=self._recipe,
            ending_request=control.pending_ending(self.run) or view.requested_ending,
            verdict=find_verdict(view, self._recipe),
        )


def _without_steps(events: Iterable[AnyEvent]) -> list[AnyEvent]:
    return [event for event in events if not isinstance(event, Step)]


def _entries(events: Sequence[AnyEvent], total_steps: int) -> list[LogEntry]:
    """Return the log entries of events. Samples, progress, and the reason for a final failure are omitted,
    because other panels show them.
    """
    entries = []
    for event in events:
        if isinstance(event, SampleGenerated | Progress):
            continue
        text = describe(event, total_steps)
        if isinstance(event, Failed) and event is events[-1]:
            text = f"failed: {event.title}"
        entries.append(LogEntry(event.at, _level(event), " ".join(text.split())))
    return entries


def _level(event: AnyEvent) -> Level:
    if isinstance(event, Failed):
        return "error"
    if isinstance(event, MemoryMeasured) and exceeds_estimate(event):
        return "warning"
    return event.severity if isinstance(event, Health) else "info"


class OutputTail:
    """Reads a growing text file, continuing where the last read stopped.

    The first read begins near the end of the file.
    """

    def __init__(self, path: Path, max_lines: int) -> None:
        self.entries: list[LogEntry] = []
        """The lines read so far. New lines are appended. If the list becomes too long, it is replaced by a
        new list with only the last lines.
        """
        self._lines = LineTail(path, end_offset(path, _OUTPUT_BYTES))
        self._max_lines = max_lines

    def read(self) -> None:
        """Add the file's new complete lines to ``entries``."""
        lines = self._lines.poll(_OUTPUT_BYTES * 4).decode("utf-8", "replace").split("\n")[:-1]
        self.entries += [LogEntry(None, "info", strip_escapes(line)) for line in lines]
        if len(self.entries) > 2 * self._max_lines:
            self.entries = self.entries[-self._max_lines :]


def strip_escapes(line: str) -> str:
    """Return a line of terminal output without colors and cursor movements.

    A progress bar is reduced to its last state, and a long line to its beginning.
    """
    shown = _ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2]
    return _CONTROLS.sub("", shown[:_MAX_CHARACTERS].expandtabs(4))
