"""How an attempt ended: read from its last event and the exit code, written where it is missing."""

from __future__ import annotations

import signal
import time

from qlora_tui.errors import Problem
from qlora_tui.format import size
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Failed, Finished, Paused, Stopped, Terminal
from qlora_tui.runs.log import EventWriter, last_event
from qlora_tui.runs.retry import last_plan
from qlora_tui.runs.shortage import what_would_fit
from qlora_tui.runs.status import State, Status, read_status, write_status
from qlora_tui.runs.telemetry import TelemetryTail
from qlora_tui.runs.view import RunView

_STEPS = 64
"""Read of a long run, the last one among them."""
LOG_LINES = 3
"""How much of the trainer's log is quoted when it died without a word."""


def how_it_ended(run: RunDir, exit_code: int | None, *, host_out_of_memory: bool = False) -> Terminal:
    """The trainer's own last word, or what can be told without one.

    ``exit_code`` is as ``subprocess`` gives it (negative: a signal); None when the trainer was not our child.
    ``host_out_of_memory``: the kernel's out-of-memory killer struck while it ran.
    """
    last = _last_word(run)
    if last is not None:
        return last
    now = time.time()
    resume = f"`qlora-tui resume {run.id}` goes on from the last checkpoint."
    status = read_status(run)
    if exit_code is None and status.process is not None and not status.process.is_from_this_boot():
        return Failed(
            at=now,
            title="The machine was restarted",
            what=f"{run.id} was in training when the machine went down.",
            fix=resume,
            kind="lost",
        )
    if exit_code is None or exit_code < 0:
        name = "" if exit_code is None else f" by {signal.Signals(-exit_code).name}"
        what = f"The trainer process was ended{name} before it could save."
        if exit_code == -signal.SIGKILL and host_out_of_memory:
            return _out_of_host_memory(run, what, exit_code, now)
        return Failed(
            at=now,
            title="The trainer was killed",
            what=what,
            fix=resume,
            kind="killed",
            exit_code=exit_code,
        )
    return Failed(
        at=now,
        title="The trainer ended without a word",
        what=f"It exited with code {exit_code}. Its log ends: {_log_end(run)}",
        fix=f"The whole log is {run.log_path}.",
        kind="bug",
        exit_code=exit_code,
    )


def settle(run: RunDir, ending: Terminal) -> None:
    """Make events and status say how it ended, where the trainer could not."""
    if _last_word(run) is None:
        with EventWriter(run.events_path) as log:
            log.append(ending)
    state: State
    if isinstance(ending, Finished):
        state, detail = "finished", ending.reason
    elif isinstance(ending, Stopped):
        state, detail = "stopped", f"Stopped at step {ending.step}."
    elif isinstance(ending, Paused):
        state, detail = "paused", f"Paused at step {ending.step}."
    else:
        state, detail = "failed", f"{ending.title}: {ending.what}"
    # The last heartbeat may be a second older than the last step.
    view, _ = RunView.sketched(run, _STEPS)
    write_status(
        run,
        Status(
            state=state,
            at=ending.at,
            step=view.step if isinstance(ending, Failed) else ending.step,
            total_steps=view.total_steps,
            loss=view.loss,
            detail=detail,
        ),
        durable=True,
    )


def _out_of_host_memory(run: RunDir, what: str, exit_code: int, now: float) -> Failed:
    """The kernel's out-of-memory killer struck while the trainer ran, and the trainer is gone."""
    samples = TelemetryTail(run.telemetry_path).poll()
    held = f" It last held {size(samples[-1].rss_bytes)}." if samples else ""
    try:
        fix = what_would_fit(last_plan(run).applied(run.recipe()))
    except Problem:
        fix = ""
    return Failed(
        at=now,
        title="Out of memory",
        what=what,
        why=f"The kernel ran out of host memory and chose it.{held}",
        fix=fix or "Lower training.micro_batch or data.max_length.",
        kind="out_of_memory",
        exit_code=exit_code,
    )


def _last_word(run: RunDir) -> Terminal | None:
    """The event that ended the last attempt, if the trainer wrote one: then it is the last of all."""
    last = last_event(run.events_path)
    return last if isinstance(last, Finished | Failed | Stopped | Paused) else None


def _log_end(run: RunDir) -> str:
    try:
        lines = run.log_path.read_text(errors="replace").splitlines()
    except OSError:
        return "(no log)"
    return " / ".join(lines[-LOG_LINES:]) or "(empty)"
