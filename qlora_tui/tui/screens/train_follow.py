"""Following one run for the screen: files in, one :class:`Picture` a second out.

:class:`Follower` is used in a thread, one call at a time. Everything of a size that grows with the run stays
in it; a picture holds what is shown and no more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qlora_tui.errors import Problem
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.describe import PhasesTold, describe, unknown_lines
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.energy import EnergyMeter
from qlora_tui.runs.events import AnyEvent, Evaluated, Failed, Health, Progress, Sampled, Step
from qlora_tui.runs.status import Status
from qlora_tui.runs.telemetry import Sample, TelemetryTail
from qlora_tui.runs.view import RunView
from qlora_tui.tui.screens.train_output import OutputTail
from qlora_tui.tui.screens.train_remedy import Remedy, remedy
from qlora_tui.tui.widgets.log_tail import Entry, Level
from qlora_tui.tui.widgets.trace import Envelope, Smoother, Trace

LONG_BYTES = 8 << 20
"""Of events: some 40,000 steps. Of a longer run only a sample of the steps is held."""
_SKETCH_STEPS = 10_000
_MOST_STEPS = 40_000
"""Held of a run that is followed; with more it is sketched anew, so that weeks of it take no more memory."""
_LEAST_WINDOW, _MOST_WINDOW = 4, 100
_HISTORY = 240
"""Telemetry samples kept for the charts: four minutes."""
_MOST_ENTRIES = 2000
_MOST_SAMPLES = 60


@dataclass(frozen=True)
class Curves:
    """What the graphs draw: over steps, thinned."""

    loss: Trace
    smooth: Trace
    learning_rate: Trace
    grad_norm: Trace
    tokens_per_s: Trace


@dataclass(frozen=True)
class Picture:
    """A run at one moment, as the live screen shows it."""

    view: RunView
    """Its single facts are read at once; its columns belong to the follower."""
    status: Status
    curves: Curves
    step: int
    epoch: float
    losses: tuple[float | None, float | None]
    """The last loss, and the running mean of it."""
    last: tuple[float | None, float | None, float | None]
    """Learning rate, gradient norm and tokens a second of the last step."""
    evaluations: tuple[Evaluated, ...]
    best: Evaluated | None
    samples: tuple[Sampled, ...]
    health: tuple[Health, ...]
    entries: Sequence[Entry]
    """The story so far; only ever appended to."""
    output: Sequence[Entry]
    """The end of the trainer's own output."""
    telemetry: tuple[Sample, ...]
    """The newest last."""
    energy_kwh: float | None
    seconds_left: float | None
    remedy: Remedy | None
    """What one key can do about what is wrong."""
    one_in: int
    """Of so many steps one is drawn: more than 1 in a very long run."""


@dataclass
class _Columns:
    """A view's columns with what thins them."""

    view: RunView
    smoother: Smoother = field(init=False)
    envelopes: dict[str, Envelope] = field(init=False)
    _last_seen: tuple[int, float] = (0, 0.0)
    _curves: Curves | None = None
    _drawn_for: object = None

    def __post_init__(self) -> None:
        series = self.view.series
        self.smoother = Smoother(series.loss)
        self.envelopes = {
            "loss": Envelope(series.loss),
            "smooth": Envelope(self.smoother.column),
            "learning_rate": Envelope(series.learning_rate),
            "grad_norm": Envelope(series.grad_norm),
            "tokens_per_s": Envelope(series.tokens_per_s),
        }

    def grow(self) -> None:
        series = self.view.series
        known, at = self._last_seen
        if known > len(series) or (known and series.at[known - 1] != at):
            # A resumed attempt did steps again.
            self.smoother.restart()
            for envelope in self.envelopes.values():
                envelope.forget_from(0)
        if self.smoother.over(smoothing_window(self.view.total_steps)):
            self.envelopes["smooth"].forget_from(0)
        self.smoother.grow()
        for envelope in self.envelopes.values():
            envelope.grow()
        self._last_seen = (len(series), series.at[-1]) if len(series) else (0, 0.0)

    def curves(self, from_step: float) -> Curves:
        """As they were, where nothing has changed."""
        drawn_for = (self._last_seen, from_step)
        if self._curves is None or self._drawn_for != drawn_for:
            steps = self.view.series.step
            traces = {name: envelope.trace(steps, from_step) for name, envelope in self.envelopes.items()}
            self._curves, self._drawn_for = Curves(**traces), drawn_for
        return self._curves


def smoothing_window(total_steps: int) -> float:
    """Steps that the running mean looks back over: a thirtieth of the run, so that its trend shows."""
    return float(min(max(total_steps / 30, _LEAST_WINDOW), _MOST_WINDOW))


class Follower:
    """Reads a run's files on from where it stopped."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.from_step = 0.0
        """Where the graphs begin: more than 0 when zoomed to the end of the run."""
        self._columns: _Columns | None = None
        self._sketched = False
        self._entries: list[Entry] = []
        self._told = 0
        """Events but steps that were read so far."""
        self._unknown_told = 0
        self._phases = PhasesTold()
        self._recipe = _recipe(run)
        self._telemetry = TelemetryTail(run.telemetry_path)
        self._recent: deque[Sample] = deque(maxlen=_HISTORY)
        self._energy = EnergyMeter(run.telemetry_path)
        self._output = OutputTail(run.log_path, _MOST_ENTRIES)

    def look(self) -> Picture:
        """The run as it is now."""
        self._recent.extend(self._telemetry.poll())
        self._energy.read()
        self._output.read()
        self._columns, events = self._read()
        self._told += len(events)
        fresh = (event for event in events if self._phases.is_new(event))
        self._entries += _entries(fresh, self._columns.view.total_steps)
        self._tell_unknown(self._columns.view)
        # A new list, so that whoever shows the old one sees that it was replaced.
        if len(self._entries) > 2 * _MOST_ENTRIES:
            self._entries = self._entries[-_MOST_ENTRIES:]
        return self._picture(self._columns)

    def _read(self) -> tuple[_Columns, list[AnyEvent]]:
        """The run as far as it is written, and the events but steps that no look has told yet."""
        if self._columns is None:
            columns, events = self._open()
        elif len(self._columns.view.series) > _MOST_STEPS:
            # A sketch has every event but steps.
            columns, events = self._sketch()
            return columns, _without_steps(events)[self._told :]
        else:
            columns, events = self._columns, self._columns.view.refresh()
        return columns, _without_steps(events)

    def _tell_unknown(self, view: RunView) -> None:
        if view.unknown_events > self._unknown_told:
            self._unknown_told = view.unknown_events
            self._entries.append(Entry(view.status.at, "warning", unknown_lines(view.unknown_events)))

    def _open(self) -> tuple[_Columns, list[AnyEvent]]:
        path = self.run.events_path
        if path.exists() and path.stat().st_size > LONG_BYTES:
            return self._sketch()
        view = RunView(self.run)
        events = view.refresh()
        return _Columns(view), events

    def _sketch(self) -> tuple[_Columns, list[AnyEvent]]:
        self._sketched = True
        view, events = RunView.sketched(self.run, _SKETCH_STEPS)
        return _Columns(view), events

    def _picture(self, columns: _Columns) -> Picture:
        view = columns.view
        columns.grow()
        series = view.series
        mean = columns.smoother.column[-1] if len(series) else None
        last = (
            (series.learning_rate[-1], series.grad_norm[-1], series.tokens_per_s[-1])
            if len(series)
            else (None, None, None)
        )
        return Picture(
            view=view,
            status=view.status,
            curves=columns.curves(self.from_step),
            step=view.step,
            epoch=series.epoch[-1] if len(series) else 0.0,
            losses=(view.loss, mean),
            last=last,
            evaluations=tuple(view.evaluations),
            best=view.best,
            samples=tuple(view.samples[-_MOST_SAMPLES:]),
            health=tuple(view.health),
            entries=self._entries,
            output=self._output.entries,
            telemetry=tuple(self._recent),
            energy_kwh=self._energy.kwh,
            seconds_left=view.seconds_left,
            remedy=remedy(view.status.state, view.health, view.ending, self._recipe),
            one_in=max(1, round(view.step / len(series))) if self._sketched and len(series) else 1,
        )


def _recipe(run: RunDir) -> Recipe | None:
    try:
        return run.recipe()
    except Problem:
        return None


def _without_steps(events: Iterable[AnyEvent]) -> list[AnyEvent]:
    return [event for event in events if not isinstance(event, Step)]


def _entries(events: Iterable[AnyEvent], total_steps: int) -> list[Entry]:
    """Lines of the log; samples and progress are shown elsewhere."""
    return [
        Entry(event.at, _level(event), " ".join(describe(event, total_steps).split()))
        for event in events
        if not isinstance(event, Sampled | Progress)
    ]


def _level(event: AnyEvent) -> Level:
    if isinstance(event, Failed):
        return "error"
    return event.severity if isinstance(event, Health) else "info"
