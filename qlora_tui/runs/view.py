"""A run as its events describe it: the one reader for live screen, history and command line.

``RunView.refresh`` reads new events and applies them. Steps that a resumed attempt repeats replace the steps
of the interrupted attempt, so that every step occurs once.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Self

from qlora_tui.runs import control, events
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventTail, sample_events
from qlora_tui.runs.memory_retry import RetryPlan
from qlora_tui.runs.status import Status, read_status

_RATE_STEPS = 20
"""Number of recent steps whose speed determines the estimate of the remaining time."""


class StepSeries:
    """Steps as columns. A column is named like a field of a step event, and has one number per step."""

    def __init__(self) -> None:
        self.step = array("q")
        self.at = array("d")
        self.epoch = array("d")
        self.loss = array("d")
        """Training losses; NaN if the loss was not a number."""
        self.learning_rate = array("d")
        self.grad_norm = array("d")
        self.tokens = array("q")
        self.tokens_per_s = array("d")
        self.reward_margin = array("d")
        """Reward margins of a preference method; NaN if a step has none."""

    def __len__(self) -> int:
        return len(self.step)

    def append(self, event: events.Step) -> None:
        """Add a step. First remove any earlier record of this step and of later steps."""
        if self.step and event.step <= self.step[-1]:
            self.cut(event.step)
        for name, column in vars(self).items():
            value = getattr(event, name)
            column.append(math.nan if value is None else value)

    def seconds(self, first: int = 0) -> float:
        """Return the training time of the steps starting at index ``first``, without evaluations and pauses.

        Computed from the throughput that the trainer measured, because the system clock may have changed.
        """
        before = self.tokens[first - 1] if first else 0
        total = 0.0
        for tokens, speed in zip(self.tokens[first:], self.tokens_per_s[first:], strict=True):
            if speed > 0:
                total += (tokens - before) / speed
            before = tokens
        return total

    def keep_last(self, most: int) -> None:
        """Remove all but the last ``most`` (at least 1) steps, for a run whose long history is stored
        elsewhere.

        In :meth:`seconds`, the first remaining step then includes the tokens of all removed steps.
        """
        for column in vars(self).values():
            del column[:-most]

    def cut(self, step: int) -> None:
        """Remove ``step`` and all later steps."""
        keep = bisect_left(self.step, step)
        for column in vars(self).values():
            del column[keep:]


def finite_losses(evaluations: Iterable[events.Evaluated]) -> tuple[tuple[int, float], ...]:
    """Return step and validation loss of each evaluation in order, without losses that are not a number."""
    losses = ((each.step, each.loss) for each in evaluations)
    return tuple((step, loss) for step, loss in losses if loss is not None and math.isfinite(loss))


class RunView:
    """State of a run, derived from its events so far."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._tail = EventTail(run.events_path)
        self.status: Status = read_status(run)
        self.series = StepSeries()
        self.queued_at: float | None = None
        """Unix time at which the run was first queued."""
        self.attempt = 0
        self.started_at: float | None = None
        self.plan = RetryPlan()
        """Settings of the last attempt; empty if its ``started`` event lacks them."""
        self.step_chosen: events.StepChosen | None = None
        """Batch that the attempt chose for the free memory; None if the recipe sets it."""
        self.phase: events.Phase | None = None
        self.phase_detail = ""
        self.progress: events.Progress | None = None
        self.data: events.DataReady | None = None
        self.environment: events.Environment | None = None
        self.adapter: events.AdapterReady | None = None
        self.verified: events.StepVerified | None = None
        self.memory: events.MemoryMeasured | None = None
        self.evaluations: list[events.Evaluated] = []
        self.validation_change: events.ValidationCompared | None = None
        """Validation loss before and after training; None until the run ends with an adapter."""
        self.checkpoints: list[events.CheckpointSaved] = []
        self.samples: list[events.SampleGenerated] = []
        self.health: list[events.Health] = []
        self.ending: events.RunEnded | None = None
        self.requested_ending = ""
        """Request, accepted by the trainer, to end this attempt; empty if there is none."""

    @classmethod
    def from_sample(cls, run: RunDir, steps: int) -> tuple[Self, list[events.AnyEvent]]:
        """Read a sample of about ``steps`` steps of a run. ``refresh`` reads on from the end of the log.

        Also returns the events, for callers that show each of them.
        """
        view = cls(run)
        sampled = sample_events(run.events_path, steps)
        view._apply_all(sampled.events)
        view._tail = EventTail(run.events_path, offset=sampled.end, unknown=sampled.unknown)
        return view, sampled.events

    def refresh(self) -> list[events.AnyEvent]:
        """Read new events; return them in order, for callers that show each of them."""
        return list(self.iter_new())

    def iter_new(self) -> Iterator[events.AnyEvent]:
        """Read new events piece by piece, for a run with too many events to hold in memory."""
        self.status = read_status(self.run)
        for piece in self._tail.pieces():
            self._apply_all(piece)
            yield from piece

    def _apply_all(self, piece: Iterable[events.AnyEvent]) -> None:
        for event in piece:
            self._apply(event)

    @property
    def unknown_events(self) -> int:
        """Number of lines that this version could not read, written by another version."""
        return self._tail.unknown

    @property
    def step(self) -> int:
        """The last completed step. The events record only some steps; the heartbeat of this attempt has the
        latest step.
        """
        last_step = self.series.step[-1] if len(self.series) else 0
        beats = self.started_at is None or self.status.at >= self.started_at
        return max(last_step, self.status.step) if beats else last_step

    @property
    def loss(self) -> float | None:
        """Training loss of the last step; NaN if it was not a number, None before the first step."""
        last_loss = self.series.loss[-1] if len(self.series) else None
        ahead = not len(self.series) or self.step > self.series.step[-1]
        return self.status.loss if ahead and self.status.loss is not None else last_loss

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run; 0 if unknown."""
        return self.data.total_steps if self.data else self.status.total_steps

    @property
    def best(self) -> events.Evaluated | None:
        """The evaluation after step 0 with the lowest score, or the lowest loss if evaluations have no score;
        None if there is none.
        """
        scored = [e for e in self.evaluations if e.loss is not None and e.step > 0]

        def score(event: events.Evaluated) -> float:
            score = event.loss if event.score is None else event.score
            return math.inf if score is None else score

        return min(scored, key=score, default=None)

    @property
    def forgetting(self) -> float | None:
        """Divergence from the base on general prompts at the last evaluation; None if not measured."""
        return self.evaluations[-1].forgetting if self.evaluations else None

    @property
    def general_answers(self) -> events.GeneralAnswers | None:
        """Counts over the answers to general prompts at the last evaluation; None if not measured."""
        return self.evaluations[-1].general_answers if self.evaluations else None

    @property
    def loss_before_training(self) -> float | None:
        """Validation loss at step 0; None if it was not measured."""
        return next((e.loss for e in self.evaluations if e.step == 0), None)

    @property
    def loss_to_beat(self) -> float | None:
        """Validation loss before training, if the best later evaluation did not get below it.

        None otherwise, or if one of the two evaluations is missing.
        """
        best, before = self.best, self.loss_before_training
        if best is None or best.loss is None or before is None or best.loss < before:
            return None
        return before

    @property
    def accuracy(self) -> float | None:
        """Share of exact answers at the last evaluation after training began; None without one, or for data
        without short answers."""
        return self.trained_evaluation.accuracy if self.trained_evaluation else None

    @property
    def last_evaluation(self) -> events.Evaluated | None:
        """The last evaluation; None before the first."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def trained_evaluation(self) -> events.Evaluated | None:
        """The last evaluation since training began; None if there is none to compare with the base."""
        last = self.last_evaluation
        return last if last is not None and last.step else None

    @property
    def base_accuracy(self) -> float | None:
        """Share of exact answers of the base, measured with the untrained adapter, which adds zero."""
        return next((e.accuracy for e in self.evaluations if e.step == 0), None)

    @property
    def seconds_per_step(self) -> float | None:
        """Mean seconds per step over the last steps, including time between steps; None before two steps."""
        series = self.series
        n = min(len(series), _RATE_STEPS)
        if n < 2:
            return None
        trained = series.seconds(len(series) - n + 1)
        # Evaluations between the steps are included. A pause, or a clock that was set, at most doubles the
        # time.
        took = min(max(trained, series.at[-1] - series.at[-n]), 2 * trained)
        return took / (series.step[-1] - series.step[-n])

    @property
    def seconds_left(self) -> float | None:
        """Remaining seconds at the speed of the last steps; None until known."""
        per_step = self.seconds_per_step
        if per_step is None or not self.total_steps or self.ending is not None:
            return None
        return max(0, self.total_steps - self.step) * per_step

    def _apply(self, event: events.AnyEvent) -> None:
        self.plan = self.plan.after(event)
        match event:
            case events.Step():
                self.series.append(event)
            case events.Started():
                self.attempt = event.attempt
                self.started_at = event.at
                self.step_chosen = None
                self.ending, self.requested_ending, self.validation_change = None, "", None
                step = event.resumed_from_step
                self.series.cut(step + 1)
                self.evaluations = [e for e in self.evaluations if e.step <= step]
                self.checkpoints = [c for c in self.checkpoints if c.step <= step]
                self.samples = [s for s in self.samples if s.step <= step]
            case events.Queued():
                self.ending, self.requested_ending = None, ""
                self.queued_at = self.queued_at or event.at
            case events.PhaseChanged():
                self.phase, self.phase_detail, self.progress = event.phase, event.detail, None
            case events.Progress():
                self.progress = event
            case events.Environment():
                self.environment = event
            case events.DataReady():
                self.data = event
            case events.AdapterReady():
                self.adapter = event
            case events.StepVerified():
                self.verified = event
            case events.MemoryMeasured():
                self.memory = event
            case events.Evaluated():
                self.evaluations.append(event)
            case events.ValidationCompared():
                self.validation_change = event
            case events.CheckpointSaved():
                self.checkpoints.append(event)
            case events.SampleGenerated():
                self.samples.append(event)
            case events.Health():
                self.health.append(event)
            case events.RequestReceived():
                self.requested_ending = (
                    event.request if event.request in control.ENDINGS else self.requested_ending
                )
            case events.StepChosen():
                self.step_chosen = event
            case events.LayersKept() | events.LayersStreamed():
                pass
            case events.Finished() | events.Failed() | events.Stopped() | events.Paused():
                self.ending, self.requested_ending = event, ""
