"""The runner: takes queued runs one at a time and watches over each one's trainer.

``python -m qlora_tui.runs.runner`` is started by whoever queues a run. One works per user and machine,
held by a lock; it ends when the queue is empty. It holds nothing that cannot be read from files again: killed
at any moment, the trainer goes on, and the next runner takes over from where things are.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_tui import paths
from qlora_tui.runs import queue
from qlora_tui.runs.detached import start
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.endings import how_it_ended, settle
from qlora_tui.runs.leftovers import sweep
from qlora_tui.runs.process import mark
from qlora_tui.runs.retry import Plan, plan_resume, plan_retry
from qlora_tui.runs.shortage import host_oom_kills
from qlora_tui.runs.status import ACTIVE, read_status

POLL_S = 0.5
"""How often a trainer that is not our child is looked at."""


def main() -> int:
    """Work until the queue is empty; 0 also when another runner is at work."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Whoever queues a run does so before starting a runner, so a runner that finds the queue empty with
    # the lock released can go: a later entry comes with a runner of its own.
    while True:
        with _lock() as held:
            if not held:
                return 0
            _work()
        if queue.next_waiting() is None:
            return 0


def _work() -> None:
    sweep()
    for run in all_runs():
        _take_over(run)
    while (run_ := queue.next_waiting()) is not None:
        if not run_.recipe_path.exists():
            queue.remove(run_)
            continue
        _run(run_, plan_resume(run_))


def _take_over(run: RunDir) -> None:
    """Do as a runner would have that was killed: wait for its trainer, and tell of a run that has ended."""
    while (state := read_status(run).state) in ACTIVE:
        time.sleep(POLL_S)
    if state == "lost" or (state not in ("queued", "unreadable") and run.untold_path.exists()):
        plan = _conclude(run, exit_code=None)
        if plan is not None:
            _run(run, plan)


def _conclude(
    run: RunDir, exit_code: int | None, events_from: int | None = None, *, host_out_of_memory: bool = False
) -> Plan | None:
    """Record how an attempt ended; the next attempt's plan, where one with less memory can help."""
    ending = how_it_ended(run, exit_code, events_from=events_from, host_out_of_memory=host_out_of_memory)
    try:
        settle(run, ending, events_from=events_from)
        if read_status(run).state == "queued":
            # Resumed while its trainer was still exiting: its turn comes with the queue.
            return None
        plan = plan_retry(run, ending)
    except OSError as error:
        # A full disk must not end the queue; the run then reads as lost, and the next runner records its end.
        print(f"{run.id}: its end could not be written: {error}", file=sys.stderr)
        return None
    if plan is None:
        _notify(run)
    return plan


def _notify(run: RunDir) -> None:
    try:
        # First: a runner that is killed here must not have the next one tell it again.
        run.untold_path.unlink(missing_ok=True)
        start("qlora_tui.runs.notify", str(run.path), output=None)
    except OSError as error:
        print(f"{run.id}: nobody could be told: {error}", file=sys.stderr)


def _run(run: RunDir, plan: Plan | None) -> None:
    """Train a run to its end, with less memory again where it ran out."""
    while plan is not None:
        kills_before = host_oom_kills()
        events_from = run.events_path.stat().st_size
        exit_code = _train(run, plan)
        plan = _conclude(run, exit_code, events_from, host_out_of_memory=host_oom_kills() > kills_before)


def _train(run: RunDir, plan: Plan) -> int:
    run.untold_path.touch(mode=0o600)
    queue.take(run, mark())
    with run.log_path.open("ab") as log:
        trainer = start("qlora_tui.training", str(run.path), *plan.arguments(), output=log)
    return trainer.wait()


@contextmanager
def _lock() -> Iterator[bool]:
    path = paths.state_dir() / "runner.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield True


if __name__ == "__main__":
    sys.exit(main())
