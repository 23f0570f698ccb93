"""A run told line by line: what ``train`` and ``attach`` print, for people, screen readers and programs."""

from __future__ import annotations

import sys
import time

from qlora_tui.cli.verb import print_json
from qlora_tui.errors import FAILED
from qlora_tui.format import count, duration, figure, size
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import (
    AdapterReady,
    AnyEvent,
    Asked,
    CheckpointSaved,
    DataReady,
    Environment,
    Evaluated,
    Failed,
    Finished,
    Health,
    MemoryMeasured,
    Paused,
    PhaseChanged,
    Progress,
    Queued,
    Sampled,
    Started,
    Step,
    Stopped,
)
from qlora_tui.runs.view import RunView

POLL_S = 0.25


def follow(run: RunDir, *, as_json: bool) -> int:
    """Print every event from the first to the run's end. 1 when it failed; Ctrl-C detaches with 0."""
    view = RunView(run)
    try:
        while True:
            for event in view.refresh():
                _tell(event, view, as_json=as_json)
            if view.ending is not None and view.status.state not in ("queued", "starting", "running"):
                break
            if view.status.state in ("lost", "unreadable"):
                print(f"{run.id} is {view.status.state}: {view.status.detail}", file=sys.stderr)
                print(f"`qlora-tui resume {run.id}` goes on from its last checkpoint.", file=sys.stderr)
                return FAILED
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"\nDetached: {run.id} goes on. `qlora-tui attach {run.id}` comes back.", file=sys.stderr)
        return 0
    return FAILED if isinstance(view.ending, Failed) else 0


def _tell(event: AnyEvent, view: RunView, *, as_json: bool) -> None:
    if as_json:
        print_json(event)
        return
    line = describe(event, view.total_steps)
    if line:
        print(f"{time.strftime('%H:%M:%S', time.localtime(event.at))}  {line}", flush=True)


def describe(event: AnyEvent, total_steps: int = 0) -> str:
    """An event as one line, or a few."""
    match event:
        case Queued():
            return "queued"
        case Started():
            again = f", going on from step {event.resumed_from_step:,}" if event.resumed_from_step else ""
            return f"attempt {event.attempt}{again}"
        case PhaseChanged():
            return f"{event.phase}{': ' + event.detail if event.detail else ''}"
        case Progress():
            return f"{event.phase} {event.done:,}/{event.total:,}"
        case Environment():
            return f"{event.device}, {event.compute_dtype}, {event.attention} attention, {event.loss} loss"
        case DataReady():
            return (
                f"{event.samples:,} samples, {event.validation_samples:,} to validate on; "
                f"{event.trained_tokens:,} of {event.tokens:,} tokens trained; {event.total_steps:,} steps"
            )
        case AdapterReady():
            share = event.trained_parameters / event.total_parameters
            return f"training {count(event.trained_parameters)} parameters ({share:.2%} of the model)"
        case MemoryMeasured():
            return f"memory: {size(event.measured_bytes)} measured, {size(event.estimated_bytes)} estimated"
        case Step():
            return (
                f"step {event.step:,}/{total_steps:,}  loss {figure(_number(event.loss))}  "
                f"lr {event.learning_rate:.2e}  grad {figure(_number(event.grad_norm), 3)}  "
                f"{event.tokens_per_s:,.0f} tok/s"
            )
        case Evaluated():
            best = "  best so far" if event.best and event.step else ""
            return f"step {event.step:,}: validation loss {figure(_number(event.loss))}{best}"
        case CheckpointSaved():
            return f"checkpoint at step {event.step:,}"
        case Sampled():
            return f"step {event.step:,}: {event.prompt!r} → {event.answer!r}"
        case Health():
            return f"{event.severity}: {event.evidence} {event.remedy}"
        case Asked():
            value = "" if event.value is None else f" {event.value:g}"
            return f"asked: {event.request.replace('_', ' ')}{value}"
        case Finished():
            return f"finished at step {event.step:,} after {duration(event.seconds)}: {event.reason}"
        case Stopped():
            return f"stopped at step {event.step:,}"
        case Paused():
            return f"paused at step {event.step:,}"
        case Failed():
            return f"failed: {event.problem()}"


def _number(value: float | None) -> float:
    # None is how an event writes what JSON cannot: NaN or infinity.
    return float("nan") if value is None else value
