"""A run as lines of text, which ``train`` and ``attach`` print for people, screen readers and programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from qlora_tui.cli.subcommand import print_json
from qlora_tui.errors import EXIT_FAILURE
from qlora_tui.runs.describe import (
    PhaseFilter,
    current_health,
    describe,
    follow_events,
    summarize_status,
    unknown_lines,
)
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import AnyEvent, Failed, Progress, Step
from qlora_tui.runs.status import RESUMABLE
from qlora_tui.runs.telemetry import Reading, TelemetryTail
from qlora_tui.runs.view import RunView

PLAIN_INTERVAL_S = 10.0
"""Minimum seconds between progress lines, so that a screen reader can read them out."""
_MAX_PAST_STEPS = 2000
"""Maximum number of past steps to print. A longer run is sampled evenly."""


def follow(run: RunDir, *, as_json: bool) -> int:
    """Print the events of a run until it is over. Ctrl-C detaches.

    With ``as_json``, every event is printed. Otherwise, past steps of a very long run are sampled, and a new
    ``Progress`` event is printed only :data:`PLAIN_INTERVAL_S` seconds after the last line.

    Returns:
        0 if the run finished, was stopped or was paused, and after Ctrl-C; otherwise 1.
    """
    view, past_events = (RunView(run), []) if as_json else RunView.from_sample(run, _MAX_PAST_STEPS)
    phases = PhaseFilter()
    for event in past_events:
        if phases.is_new(event) and not isinstance(event, Progress):
            _print_line(event.at, describe(event, view.total_steps))
    if past_events and view.step > len(view.series) * run.recipe().training.log_every:
        print(f"Showing {len(view.series):,} of {view.step:,} steps; --json prints all.", file=sys.stderr)

    printed_at = time.monotonic()

    def on_event(event: AnyEvent) -> None:
        nonlocal printed_at
        if as_json:
            print_json(event)
        elif phases.is_new(event) and (
            not isinstance(event, Progress) or time.monotonic() - printed_at >= PLAIN_INTERVAL_S
        ):
            printed_at = time.monotonic()
            _print_line(event.at, describe(event, view.total_steps))

    return _follow_to_end(view, on_event)


def follow_plain(run: RunDir) -> int:
    """Print the live screen's content as sentences: the current state, events, and state updates.

    The output suits screen readers and logs: it consists of complete lines, with at most one state update
    every :data:`PLAIN_INTERVAL_S` seconds.
    """
    view, past_events = RunView.from_sample(run, _MAX_PAST_STEPS)
    phases = PhaseFilter()
    for event in past_events:
        phases.is_new(event)
    machine = _LastSample(run)
    print(f"{run.id}: {summarize_status(view, machine.poll())}", flush=True)
    for health in {warning.kind: warning for warning in current_health(view)}.values():
        _print_line(health.at, describe(health))
    if view.ending is not None:
        _print_line(view.ending.at, describe(view.ending))
    printed_at = time.monotonic()

    def on_event(event: AnyEvent) -> None:
        nonlocal printed_at
        if not phases.is_new(event):
            return
        if not isinstance(event, Step | Progress):
            _print_line(event.at, describe(event, view.total_steps))
        elif time.monotonic() - printed_at >= PLAIN_INTERVAL_S:
            printed_at = time.monotonic()
            _print_line(event.at, summarize_status(view, machine.poll()))

    return _follow_to_end(view, on_event)


class _LastSample:
    def __init__(self, run: RunDir) -> None:
        self._tail = TelemetryTail(run.telemetry_path)
        self._sample: Reading | None = None

    def poll(self) -> Reading | None:
        """Return the newest sample; None if there is none."""
        self._sample = next(reversed(self._tail.poll()), self._sample)
        return self._sample


def _follow_to_end(view: RunView, on_event: Callable[[AnyEvent], None]) -> int:
    run = view.run
    try:
        for event in follow_events(view, lambda detail: print(f"{run.id}: {detail}", file=sys.stderr)):
            on_event(event)
    except KeyboardInterrupt:
        print(f"\nDetached: {run.id} continues. Reattach with `qlora-tui attach {run.id}`.", file=sys.stderr)
        return 0
    if view.unknown_events:
        print(unknown_lines(view.unknown_events), file=sys.stderr)
    if view.ending is None:
        print(f"{run.id} is {view.status.state}: {view.status.detail}", file=sys.stderr)
        if view.status.state in RESUMABLE:
            print(f"`qlora-tui resume {run.id}` continues the run from its last checkpoint.", file=sys.stderr)
        return 0 if view.status.state in ("finished", "stopped", "paused") else EXIT_FAILURE
    return EXIT_FAILURE if isinstance(view.ending, Failed) else 0


def _print_line(at: float, line: str) -> None:
    if line:
        print(f"{time.strftime('%H:%M:%S', time.localtime(at))}  {line}", flush=True)
