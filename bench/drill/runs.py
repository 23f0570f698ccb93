"""Runs that real runners and trainers work on, and what must be true at their end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil

from bench.drill.program import Failure, write
from bench.drill.samples import jsonl
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.events import CheckpointSaved, Failed, Finished, Step
from qlora_tui.runs.log import EventTail
from qlora_tui.runs.status import State, read_status

STEPS = 30
_SETTINGS = (
    *("training.checkpoint_every=2", "training.evaluate_every=5", f"training.max_steps={STEPS}"),
    *("training.epochs=50", "data.max_length=64", "lora.rank=4", "training.gradient_accumulation=1"),
)
LONGEST_S = 240.0
_OVER: frozenset[State] = frozenset(("finished", "failed", "stopped", "paused", "lost", "unreadable", "gone"))


def program(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A call of the command line in a process of its own, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "qlora_tui", *words],
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        env=os.environ | (environment or {}),
        cwd=Path(__file__).parents[2],
    )


def started(materials: Path, home: Path, environment: dict[str, str] | None = None) -> RunDir:
    """A run that a new runner works on. Raises Failure where it could not be queued."""
    rows = write(home / "rows.jsonl", jsonl())
    words = ["train", "--preset", "cpu-demo", "--model", str(materials / "model"), "--data", str(rows)]
    for setting in _SETTINGS:
        words += ["--set", setting]
    done = program(*words, "--detach", environment=environment)
    if done.returncode:
        raise Failure(f"`train --detach` ended with {done.returncode}: {done.stderr[-300:]}")
    (run,) = all_runs()
    return run


def wait_until_over(run: RunDir) -> State:
    """The state of a run that no process works on any more. Raises Failure after :data:`LONGEST_S`."""
    until = time.monotonic() + LONGEST_S
    while time.monotonic() < until:
        state = read_status(run).state
        if state in _OVER and not processes(run):
            return state
        time.sleep(0.2)
    raise Failure(f"the run was still {read_status(run).state} after {LONGEST_S:.0f} s; {_last(run)}")


def wait_for_step(run: RunDir, step: int) -> None:
    """Return when the run has taken so many steps or is over. Raises Failure after :data:`LONGEST_S`."""
    until = time.monotonic() + LONGEST_S
    while time.monotonic() < until:
        status = read_status(run)
        if status.step >= step or status.state in _OVER:
            return
        time.sleep(0.02)
    raise Failure(f"step {step} did not come within {LONGEST_S:.0f} s; {_last(run)}")


def processes(run: RunDir) -> list[psutil.Process]:
    """Runners and trainers that work in this attempt's state folder."""
    state = os.environ["XDG_STATE_HOME"]
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        ours = "qlora_tui.runs.runner" in words or "qlora_tui.training" in words
        try:
            if ours and process.environ().get("XDG_STATE_HOME") == state:
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill(run: RunDir, luck: random.Random, number: int = signal.SIGKILL) -> list[str]:
    """Send a signal to trainers, runners or both; which they were."""
    module = luck.choice(("qlora_tui.training", "qlora_tui.runs.runner", ""))
    hit = []
    for process in processes(run):
        words = process.info["cmdline"]
        if not module or module in words:
            try:
                process.send_signal(number)
            except psutil.Error:
                continue
            hit.append("trainer" if "qlora_tui.training" in words else "runner")
    return hit


def kill_everything(run: RunDir) -> None:
    """Leave no process behind after an attempt."""
    for process in processes(run):
        try:
            process.kill()
        except psutil.Error:
            continue


def resume_to_the_end(run: RunDir, *, most: int = 3) -> None:
    """Resume the run until it is finished. Raises Failure where it cannot be."""
    for _ in range(most):
        state = wait_until_over(run)
        if state == "finished":
            return
        done = program("resume", run.id)
        if done.returncode:
            raise Failure(f"`resume` of a run that is {state} failed: {done.stderr[-300:]}")
    state = wait_until_over(run)
    if state != "finished":
        raise Failure(f"the run is {state} after {most} resumes; {_last(run)}")


def check_finished(run: RunDir) -> None:
    """Raise Failure unless every step is there once, none was lost beyond a checkpoint, and files verify."""
    tail = EventTail(run.events_path)
    events = list(tail.drain())
    if tail.unknown:
        raise Failure(f"{tail.unknown} lines of events.jsonl cannot be read")
    last, saved = 0, 0
    for event in events:
        if isinstance(event, CheckpointSaved):
            saved = event.step
        if isinstance(event, Step):
            if event.step > last + 1 or event.step <= saved:
                raise Failure(f"step {event.step} follows step {last}, with a checkpoint at {saved}")
            last = event.step
    if last != STEPS or not isinstance(events[-1], Finished):
        raise Failure(f"the last step is {last} of {STEPS}, the last event {type(events[-1]).__name__}")
    done = program("runs", "check", "--json")
    if done.returncode:
        raise Failure(f"`runs check` of a finished run: {done.stdout[-500:]}")


def check_no_failure(run: RunDir) -> None:
    """Raise Failure where an event says that the run failed."""
    for event in EventTail(run.events_path).drain():
        if isinstance(event, Failed):
            raise Failure(f"the run was said to have failed: {event.title}: {event.what}")


def _last(run: RunDir) -> str:
    events = list(EventTail(run.events_path).drain())
    return f"its last event is {json.loads(msgspec.json.encode(events[-1])) if events else None}"
