"""Runs that real runners and trainers work on, and what must be true at their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import psutil

from bench.drill.program import Failure, write
from bench.drill.samples import jsonl
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import CheckpointSaved, Failed, Finished, Step
from qlora_tui.runs.spawn import ensure_runner
from qlora_tui.runs.status import State, Status, read_status

STEPS = 30
_SETTINGS = (
    *("training.checkpoint_every=2", "training.eval_every=5", f"training.max_steps={STEPS}"),
    *("training.epochs=50", "data.max_length=64", "lora.rank=4", "training.gradient_accumulation=1"),
)
MODULES = ("qlora_tui.training", "qlora_tui.runs.runner")
"""What a trainer and a runner are started as."""
LONGEST_S = 240.0
_OVER: frozenset[State] = frozenset(("finished", "failed", "stopped", "paused", "lost", "unreadable", "gone"))


def program(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in its own process, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "qlora_tui", *words],
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        env=os.environ | (environment or {}),
        cwd=Path(__file__).parents[2],
    )


@contextmanager
def started(materials: Path, home: Path, environment: dict[str, str] | None = None) -> Iterator[RunDir]:
    """A run that a new runner works on; its processes are killed at the end of the block.

    Raises Failure where it could not be queued.
    """
    rows = write(home / "rows.jsonl", jsonl())
    words = ["train", "--preset", "cpu-demo", "--model", str(materials / "model"), "--data", str(rows)]
    for setting in _SETTINGS:
        words += ["--set", setting]
    done = program(*words, "--detach", environment=environment)
    if done.returncode:
        raise Failure(f"`train --detach` ended with {done.returncode}: {done.stderr[-300:]}")
    (run,) = all_runs()
    try:
        yield run
    finally:
        kill_all()


def wait_until_over(run: RunDir) -> State:
    """The state of a run that no process works on any more. Raises Failure after :data:`LONGEST_S`."""

    def is_over(status: Status) -> bool:
        if processes():
            return False
        if status.state == "queued":
            ensure_runner()  # as `attach` and the app do: the runner may have been killed
        return status.state in _OVER

    return wait_until(run, is_over, "over", every_s=0.2).state


def wait_for_step(run: RunDir, step: int) -> None:
    """Return when the run has reached ``step`` or is over. Raises Failure after :data:`LONGEST_S`."""
    wait_until(run, lambda status: status.step >= step or status.state in _OVER, f"at step {step}")


def wait_until(
    run: RunDir, condition: Callable[[Status], bool], what: str, *, every_s: float = 0.02
) -> Status:
    """The status for which ``condition`` holds. Raises Failure after :data:`LONGEST_S`.

    ``what`` completes "the run was not …".
    """
    until = time.monotonic() + LONGEST_S
    while not condition(status := read_status(run)):
        if time.monotonic() > until:
            raise Failure(
                f"the run was not {what} after {LONGEST_S:.0f} s: it is {status.state}; {_last(run)}"
            )
        time.sleep(every_s)
    return status


def processes() -> list[psutil.Process]:
    """Runners and trainers that work in this attempt's state folder."""
    state = os.environ["XDG_STATE_HOME"]
    ours = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        with suppress(psutil.Error):
            if (
                any(module in words for module in MODULES)
                and process.environ().get("XDG_STATE_HOME") == state
            ):
                ours.append(process)
    return ours


def kill_all() -> None:
    """Kill the trainers and runners of this attempt; return when none is left."""
    while running := processes():
        send_signal(signal.SIGKILL)
        psutil.wait_procs(running, timeout=1)


def send_signal(number: int, modules: Collection[str] = MODULES) -> None:
    """Send a signal to the trainers and runners of this attempt, or to those of one module."""
    for process in processes():
        if any(module in process.info["cmdline"] for module in modules):
            with suppress(psutil.Error):
                process.send_signal(number)


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
