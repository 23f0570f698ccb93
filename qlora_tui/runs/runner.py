"""The runner: takes queued runs one at a time and supervises each one's trainer.

``python -m qlora_tui.runs.runner`` is started whenever a run is queued. A lock ensures one runner per user
and machine; it exits when the queue is empty. All of its state can be read from files again: if it is
killed, the trainer continues, and the next runner takes over.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from qlora_tui import paths
from qlora_tui.errors import EXIT_FAILURE, UserError, disk_problem
from qlora_tui.files import open_append
from qlora_tui.locks import PATIENCE_S, is_locked, locked
from qlora_tui.runs import actions, run_queue
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.leftovers import sweep
from qlora_tui.runs.outcomes import determine_outcome, log_size, record_outcome
from qlora_tui.runs.process import process_identity, runner_lock_path, spawn_detached
from qlora_tui.runs.retry import RetryPlan, host_oom_kills, plan_resume, plan_retry
from qlora_tui.runs.status import ACTIVE, read_status, refuse_other_machines
from qlora_tui.worker import start_detached

POLL_S = 0.5
"""Seconds between checks of a run that another process trains."""
EXITING_S = 60.0
"""Seconds that a trainer may take to exit after recording its run's end."""
_RELEASE_S = 2.0
"""Seconds that the lock against a suspension may take to be released."""


def main() -> int:
    """Work until the queue is empty; return the exit code, 0 also if another runner is active."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    skipped: set[str] = set()
    try:
        # A run is queued before a runner is started for it, so a runner that finds the queue empty with
        # the lock released can exit: a later entry starts its own runner.
        while True:
            with locked(runner_lock_path(), patience_s=PATIENCE_S) as lock:
                if lock is None:
                    return 0
                # Only for what is said of a suspended runner.
                with suppress(OSError):
                    lock.truncate(0)
                    os.write(lock.fileno(), f"{os.getpid()}\n".encode())
                refuse_other_machines()
                with _awake():
                    _run_queue(skipped)
            if _next(skipped) is None:
                return 0
    except UserError as problem:
        _log(problem)
        return problem.exit_code
    except OSError as error:
        _log(disk_problem(error) or error)
        return EXIT_FAILURE


@contextmanager
def _awake() -> Iterator[None]:
    """Keep the machine from suspending, if systemd runs here and lets this user: a GPU loses its memory then.

    The lock is held by a child that ends with its input, so also with this process, however that ends.
    """
    program, holder = shutil.which("systemd-inhibit"), None
    if program is not None:
        options = ["--what=idle:sleep", "--mode=block", "--who=qlora-tui", "--why=A run is in training."]
        with suppress(OSError):
            holder = subprocess.Popen(
                [program, *options, "cat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # A signal for this process group is not for the lock.
                start_new_session=True,
            )
    try:
        yield
    finally:
        if holder is not None:
            with suppress(subprocess.TimeoutExpired):
                holder.communicate(timeout=_RELEASE_S)


def _run_queue(skipped: set[str]) -> None:
    # What stays takes room, and keeps no run waiting.
    with suppress(OSError, UserError):
        sweep()
        actions.empty_trash(actions.KEPT_S)
    for run in all_runs():
        _guarded(run, _take_over)
    while (next_run := _next(skipped)) is not None:
        if not _guarded(next_run, _begin):
            # It stays in the queue: the next runner tries again.
            skipped.add(next_run.id)


def _next(skipped: set[str]) -> RunDir | None:
    name = next((name for name in run_queue.waiting() if name not in skipped), None)
    return None if name is None else RunDir(paths.runs_dir() / name)


def _log(message: object) -> None:
    """Write to the runner's log, unless its disk is full: that must not end the queue."""
    with suppress(OSError):
        print(message, file=sys.stderr)


def _guarded(run: RunDir, work: Callable[[RunDir], None]) -> bool:
    """Work on one run; log any error and return False, so that the other runs continue."""
    try:
        work(run)
    except (OSError, UserError) as error:
        _log(f"{run.id}: {error}")
        return False
    except Exception:
        _log(f"{run.id}:\n{traceback.format_exc()}")
        return False
    return True


def _take_over(run: RunDir) -> None:
    """Wait for the trainer of a runner that was killed, and record how the run ended."""
    while (status := read_status(run)).state in ACTIVE or (
        # That runner was killed before its trainer wrote a status.
        status.state == "lost" and is_locked(run.trainer_lock_path)
    ):
        if status.process is None:
            time.sleep(POLL_S)
        else:
            status.process.wait(POLL_S)
    if status.state == "lost" or (
        status.state not in ("queued", "unreadable", "gone") and run.unreported_path.exists()
    ):
        _supervise(run, _record_and_plan_retry(run, exit_code=None))


def _begin(run: RunDir) -> None:
    if not run.recipe_path.exists():
        run_queue.remove(run)
        return
    deadline = time.monotonic() + EXITING_S
    # Its last trainer may still be exiting, and may have no parent that waits for it.
    while is_locked(run.trainer_lock_path):
        if time.monotonic() > deadline:
            raise UserError(
                "The run is already training", what=f"Another trainer holds {run.trainer_lock_path}."
            )
        time.sleep(POLL_S)
    _supervise(run, plan_resume(run))


def _record_and_plan_retry(
    run: RunDir,
    exit_code: int | None,
    events_from: int | None = None,
    log_from: int | None = None,
    *,
    host_out_of_memory: bool = False,
) -> RetryPlan | None:
    """Record how an attempt ended; return a plan for the next attempt if less memory can help."""
    if run.is_deleted:
        _log(f"{run.id}: it was deleted while it was training")
        return None
    ending = determine_outcome(
        run,
        exit_code,
        events_from=events_from,
        log_from=log_from,
        host_out_of_memory=host_out_of_memory,
    )
    try:
        record_outcome(run, ending, events_from=events_from)
        if read_status(run).state == "queued":
            # Resumed while its trainer was still exiting: the queue handles it.
            return None
        plan = plan_retry(run, ending)
    except OSError as error:
        # A full disk must not end the queue; the run then reads as lost, and the next runner records its end.
        _log(f"{run.id}: its end could not be recorded: {error}")
        return None
    if plan is None:
        _notify(run)
    return plan


def _notify(run: RunDir) -> None:
    try:
        # Before notifying: if this runner is killed now, the next one must not notify again.
        run.unreported_path.unlink(missing_ok=True)
        start_detached("qlora_tui.runs.notify:notify", run.path, stdout=subprocess.DEVNULL, stderr=None)
    except OSError as error:
        _log(f"{run.id}: the notification failed: {error}")


def _supervise(run: RunDir, plan: RetryPlan | None) -> None:
    """Train a run to its end, retrying with less memory if it runs out."""
    while plan is not None:
        kills_before = host_oom_kills()
        events_from, log_from = run.events_path.stat().st_size, log_size(run)
        exit_code = _train(run, plan)
        plan = _record_and_plan_retry(
            run, exit_code, events_from, log_from, host_out_of_memory=host_oom_kills() > kills_before
        )


def _train(run: RunDir, plan: RetryPlan) -> int:
    """Run one trainer to its end; return its exit code. Raises OSError if the run cannot be taken."""
    with open_append(run.log_path) as log:
        run.unreported_path.touch(mode=0o600)
        run_queue.take(run, process_identity())
        try:
            trainer = spawn_detached("qlora_tui.training", str(run.path), *plan.to_arguments(), output=log)
        except OSError as error:
            log.write(f"The trainer could not be started: {error}\n".encode())
            return EXIT_FAILURE
    return trainer.wait()


if __name__ == "__main__":
    sys.exit(main())
