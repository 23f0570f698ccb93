"""Determines how an attempt ended, from its events, its log and its exit code, and records the ending if it
is missing.

The events of an attempt are those after its ``Started``. The last event of the file may belong to no attempt:
if a run is resumed while its trainer is still exiting, it is ``Queued``. The log holds the output of all
attempts and may have any length, so only its end is read.
"""

from __future__ import annotations

import signal
import time
from contextlib import suppress

from msgspec import structs

from qlora_tui.errors import EXIT_DISK, EXIT_FAILURE, UserError
from qlora_tui.formatting import format_bytes
from qlora_tui.gpu.cuda_errors import CudaError, describe, error_in_log, says_out_of_memory, sentence_in_log
from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.process_end import how_ended
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import events
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import append_event, events_backwards, last_log_lines
from qlora_tui.runs.memory_retry import describe_fix, last_phase, last_plan
from qlora_tui.runs.status import State, ended_status, read_status, write_status
from qlora_tui.runs.telemetry import TelemetryTail
from qlora_tui.runs.view import RunView

_LOG_LINES = 3
"""Number of log lines to quote."""
_STEPS = 64
"""Number of steps sampled from a long run, including the last."""
_FINAL_STATES: frozenset[State] = frozenset(("finished", "failed", "stopped", "paused"))


def determine_outcome(
    run: RunDir,
    exit_code: int | None,
    *,
    events_from: int | None = None,
    log_from: int | None = None,
    host_out_of_memory: bool = False,
    processes: int = 1,
) -> events.RunEnded:
    """Return the ending that the trainer recorded, or one derived from the exit code.

    Args:
        run: The run, whose trainer has exited.
        exit_code: Exit code as in ``subprocess`` (negative for a signal); None if the trainer was no child of
            this process.
        events_from: Size of the event file when the trainer started; None if unknown.
        log_from: Size of the log at that time; None if unknown.
        host_out_of_memory: Whether the kernel's out-of-memory killer acted while the trainer ran.
        processes: Number of trainer processes. Several are started by torchrun, whose exit code says that one
            failed.
    """
    recorded = _terminal_event(run, events_from)
    if recorded is not None:
        return recorded
    resume = f"`qlora-tui resume {run.id}` continues from the last checkpoint."
    status = read_status(run)
    process = status.process
    was_here = process is not None and process.is_from_this_host
    if exit_code is None and process is not None and was_here and not process.is_from_this_boot:
        return events.Failed(
            title="The machine was restarted",
            what=f"{run.id} was training when the machine went down.",
            fix=resume,
            kind="lost",
        )
    # SIGABRT is how C++ ends a process if CUDA fails while an exception is handled.
    may_be_cuda = exit_code == -signal.SIGABRT or (exit_code or 0) > 0
    cuda_line = last_cuda_line(run, log_from) if may_be_cuda and log_from is not None else ""
    if says_out_of_memory(sentence_in_log(cuda_line)):
        what = "A library found no free GPU memory and ended the trainer."
        why = f"The library's message: {cuda_line.strip()}."
        return _out_of_memory(run, "Out of GPU memory", what, why, exit_code)
    problem = gpu_problem(run, error_in_log(cuda_line)) if exit_code != 0 else None
    if problem is not None:
        return events.Failed.from_problem(problem, at=time.time(), exit_code=exit_code)
    # Each process records why it ended, unless it is killed.
    is_one_killed = processes > 1 and exit_code == EXIT_FAILURE
    if exit_code is None or exit_code < 0 or is_one_killed:
        subject = f"One of the trainer's {processes} processes" if is_one_killed else "The trainer process"
        how = "was killed" if exit_code is None or is_one_killed else how_ended(exit_code)
        what = f"{subject} {how} before it could save."
        if host_out_of_memory and (is_one_killed or exit_code == -signal.SIGKILL):
            return _out_of_memory(run, "Out of memory", what, _host_memory(run), exit_code)
        return events.Failed(
            title="The trainer was killed",
            what=what,
            fix=resume,
            kind="killed",
            exit_code=exit_code,
        )
    if exit_code == 0:
        return events.Failed(
            title="The end of the run was not recorded",
            what="The trainer exited without an error, but its events do not record how the run ended.",
            why="The disk may have been full.",
            fix=resume,
            kind="lost",
            exit_code=0,
        )
    if exit_code == EXIT_DISK:
        return events.Failed(
            title="The disk failed",
            what=f"The trainer could not even record how the run ended. Its log ends: {quote_log_end(run)}",
            fix=f"Check free space and `dmesg`. {resume}",
            kind="problem",
            exit_code=exit_code,
        )
    return events.Failed(
        title="The trainer ended without a message",
        what=f"The trainer {how_ended(exit_code)}. Its log ends: {quote_log_end(run)}",
        fix=f"The whole log is in {run.log_path}.",
        kind="bug",
        exit_code=exit_code,
    )


def record_outcome(run: RunDir, ending: events.RunEnded, *, events_from: int | None = None) -> None:
    """Record the ending of an attempt in events and status, unless it is recorded there.

    A run that was queued again in the meantime is skipped, because its ending was known when it was queued.
    """
    now = read_status(run).state
    if now == "queued":
        return
    if _terminal_event(run, events_from) is None:
        append_event(run.events_path, ending)
    elif now in _FINAL_STATES:
        return
    # The last heartbeat may be a second older than the last step.
    view, _ = RunView.from_sample(run, _STEPS)
    status = ended_status(ending)
    step = status.step or view.step
    write_status(run, structs.replace(status, step=step, total_steps=view.total_steps, loss=view.loss))


def gpu_problem(run: RunDir, error: CudaError | None) -> UserError | None:
    """Return the GPU problem that ended an attempt, with a way to continue; None if the GPU did not end it.

    Args:
        run: The run, whose events say if the driver lost the GPU.
        error: The error that CUDA reported, if any.
    """
    if _gpu_was_lost(run):
        problem: UserError = GpuUnavailableError(GpuUnavailableReason.LOST)
        fix = "Reboot; `sudo dmesg | grep -i xid` shows the driver's messages."
    elif error is not None:
        problem = describe(error)
        fix = problem.fix
    else:
        return None
    where = "continues from the last checkpoint" if run.checkpoints() else "starts the run again"
    return problem.replace(fix=f"{fix} `qlora-tui resume {run.id}` then {where}.")


def log_size(run: RunDir) -> int:
    """Return the size of the log in bytes; 0 if there is no log."""
    try:
        return run.log_path.stat().st_size
    except OSError:
        return 0


def quote_log_end(run: RunDir) -> str:
    """Return the last lines of the log, joined into one line for a message."""
    return " / ".join(last_log_lines(run.log_path)[-_LOG_LINES:]) or "(empty)"


def last_cuda_line(run: RunDir, log_from: int) -> str:
    """Return the last log line in which a library reports the CUDA error that ended the trainer; empty if
    there is none.

    Args:
        run: The run, whose trainer has exited.
        log_from: Size of the log when the trainer started, so that earlier attempts are ignored.
    """
    lines = last_log_lines(run.log_path, log_from)
    return next((line for line in reversed(lines) if sentence_in_log(line)), "")


def _gpu_was_lost(run: RunDir) -> bool:
    """Return whether the driver lost the GPU during the last attempt."""
    for event in events_backwards(run.events_path):
        if isinstance(event, events.Started | events.Queued):
            break
        if isinstance(event, events.Health) and event.kind == events.GPU_LOST:
            return True
    return False


def _out_of_memory(run: RunDir, title: str, what: str, why: str, exit_code: int | None) -> events.Failed:
    """Return the event for a trainer that ran out of memory and was ended before it could record this."""
    recipe: Recipe | None = None
    with suppress(UserError):
        recipe = last_plan(run).apply_to(run.recipe())
    phase = last_phase(run)
    return events.Failed(
        title=title,
        what=what,
        why=why,
        fix=describe_fix(recipe, phase),
        kind="out_of_memory",
        exit_code=exit_code,
        phase=phase,
    )


def _host_memory(run: RunDir) -> str:
    """Return a sentence on the out-of-memory kill of the trainer, with the memory that it held."""
    samples = TelemetryTail(run.telemetry_path).poll()
    held = f" It last held {format_bytes(samples[-1].rss_bytes)}." if samples else ""
    return f"The machine ran out of host memory, so the kernel killed the process.{held}"


def _terminal_event(run: RunDir, events_from: int | None = None) -> events.RunEnded | None:
    """Return the first ending after the last ``Started``.

    With ``events_from``, events before this offset are ignored. Without it, events before the run was last
    queued are ignored. Otherwise a trainer that died before it recorded ``Started`` would get the ending of
    the previous attempt.
    """
    ending: events.RunEnded | None = None
    for event in events_backwards(run.events_path, events_from or 0):
        if isinstance(event, events.Started) or (events_from is None and isinstance(event, events.Queued)):
            break
        if isinstance(event, events.RunEnded):
            ending = event
    return ending
