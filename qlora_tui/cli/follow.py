"""A run told line by line: what ``train`` and ``attach`` print, for people, screen readers and programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from qlora_tui.cli.verb import print_json
from qlora_tui.errors import FAILED
from qlora_tui.runs.describe import PhasesTold, describe, unknown_lines
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import AnyEvent, Failed, Progress, Step
from qlora_tui.runs.following import followed
from qlora_tui.runs.standing import standing
from qlora_tui.runs.status import RESUMABLE
from qlora_tui.runs.telemetry import Sample, TelemetryTail
from qlora_tui.runs.view import RunView

SAID_EVERY_S = 10.0
"""Least time between two lines on how far a run or a phase is: what a voice can read out."""
_MOST_STEPS = 2000
"""Lines of steps that lie behind: of a longer run so many are told, evenly."""


def follow(run: RunDir, *, as_json: bool) -> int:
    """Print every event from the first to the run's end. 1 when it failed; Ctrl-C detaches with 0.

    Of a run of many thousand steps only some of those behind are told, but with ``as_json`` all.
    """
    view, told = (RunView(run), []) if as_json else RunView.sketched(run, _MOST_STEPS)
    phases = PhasesTold()
    for event in told:
        if phases.is_new(event) and not isinstance(event, Progress):
            _say(event.at, describe(event, view.total_steps))
    if told and view.step > len(view.series) * run.recipe().training.log_every:
        print(f"Of {view.step:,} steps {len(view.series):,} are told; --json has all.", file=sys.stderr)

    said_at = time.monotonic()

    def tell(event: AnyEvent) -> None:
        nonlocal said_at
        if as_json:
            print_json(event)
        elif phases.is_new(event) and (
            not isinstance(event, Progress) or time.monotonic() - said_at >= SAID_EVERY_S
        ):
            said_at = time.monotonic()
            _say(event.at, describe(event, view.total_steps))

    return _to_its_end(view, tell)


def follow_plain(run: RunDir) -> int:
    """What the live screen says, in sentences: how the run stands now, what happens, how it stands since.

    For screen readers and logs: only whole lines, and of the steps one in :data:`SAID_EVERY_S`.
    """
    view, behind = RunView.sketched(run, _MOST_STEPS)
    phases = PhasesTold()
    for event in behind:
        phases.is_new(event)
    machine = _LastSample(run)
    print(f"{run.id}: {standing(view, machine.look())}", flush=True)
    for health in {told.kind: told for told in view.health}.values():
        _say(health.at, describe(health))
    if view.ending is not None:
        _say(view.ending.at, describe(view.ending))
    said_at = time.monotonic()

    def tell(event: AnyEvent) -> None:
        nonlocal said_at
        if not phases.is_new(event):
            return
        if not isinstance(event, Step | Progress):
            _say(event.at, describe(event, view.total_steps))
        elif time.monotonic() - said_at >= SAID_EVERY_S:
            said_at = time.monotonic()
            _say(event.at, standing(view, machine.look()))

    return _to_its_end(view, tell)


class _LastSample:
    def __init__(self, run: RunDir) -> None:
        self._tail = TelemetryTail(run.telemetry_path)
        self._sample: Sample | None = None

    def look(self) -> Sample | None:
        """The newest there is."""
        self._sample = next(reversed(self._tail.poll()), self._sample)
        return self._sample


def _to_its_end(view: RunView, tell: Callable[[AnyEvent], None]) -> int:
    run = view.run
    try:
        for event in followed(view, lambda detail: print(f"{run.id}: {detail}", file=sys.stderr)):
            tell(event)
    except KeyboardInterrupt:
        print(f"\nDetached: {run.id} goes on. `qlora-tui attach {run.id}` comes back.", file=sys.stderr)
        return 0
    if view.unknown_events:
        print(unknown_lines(view.unknown_events), file=sys.stderr)
    if view.ending is None:
        print(f"{run.id} is {view.status.state}: {view.status.detail}", file=sys.stderr)
        if view.status.state in RESUMABLE:
            print(f"`qlora-tui resume {run.id}` goes on from its last checkpoint.", file=sys.stderr)
        return 0 if view.status.state in ("finished", "stopped", "paused") else FAILED
    return FAILED if isinstance(view.ending, Failed) else 0


def _say(at: float, line: str) -> None:
    if line:
        print(f"{time.strftime('%H:%M:%S', time.localtime(at))}  {line}", flush=True)
