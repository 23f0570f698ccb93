"""The program of a cluster job: trains one run, and turns a time limit into a pause.

The job's script replaces itself with ``python -m qlora_tui.runs.slurm_job RUN`` (``exec``). Slurm sends
SIGTERM to this process before the time limit, and when another job takes the node. The run then saves within
the current step, and Slurm is asked to start the job again. The restarted job resumes the run exactly.
Retries after running out of memory, the record of how the run ended, and the notification work as in the
queue (:mod:`qlora_tui.runs.supervision`). The trainer is a step of the job (``srun``), so that Slurm ends it
with the job, however this process ends.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from msgspec import structs

from qlora_tui.errors import EXIT_FAILURE, UserError, disk_problem
from qlora_tui.runs import run_queue, slurm
from qlora_tui.runs.devices import Devices, RunDevice, choose, devices_of, record_devices, wanted_devices
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import append_event, last_event
from qlora_tui.runs.events import Paused, Queued
from qlora_tui.runs.holds import Hold
from qlora_tui.runs.notify import notify
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.slurm import SeenJob
from qlora_tui.runs.slurm_runs import record_job
from qlora_tui.runs.status import (
    ACTIVE,
    OUTDATED_BEAT_S,
    Status,
    has_live_trainer,
    read_status,
    recorded_status,
    write_status,
)
from qlora_tui.runs.supervision import POLL_S, Supervisor, log

# All CPUs of the job. By default, srun gives a task one CPU and binds it there.
_SRUN = ("srun", "--nodes=1", "--ntasks=1", "--cpu-bind=none", "--unbuffered", "--kill-on-bad-exit=1")
_BY_SIGNAL = 128
"""Offset that srun adds to a signal's number in the exit code of a task that the signal ended."""


class _Job(Supervisor):
    """Supervisor of the run of this job."""

    starts_through = _SRUN

    def __init__(self, job: str) -> None:
        super().__init__(self._limit)
        self._job = job
        self.is_told_to_leave = False

    def listen(self) -> None:
        """Handle SIGTERM, which Slurm sends to the script alone, by leaving the node."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def claim(self, devices: Devices) -> AbstractContextManager[tuple[int, ...] | None]:
        """Do not claim devices: Slurm gives each GPU to one job at a time."""
        return nullcontext(())

    def awake(self) -> AbstractContextManager[None]:
        """Do nothing: a node's administrators decide when it suspends."""
        return nullcontext()

    def take(self, run: RunDir, devices: Devices) -> None:
        """Record that this job starts a trainer for the run.

        A runner on another machine then does not record how the run ended.
        """
        record_devices(run, devices)
        run_queue.take(run, process_identity())

    def code_of_trainer(self, exit_code: int) -> int:
        """Return the trainer's exit code, derived from srun's exit code."""
        return _BY_SIGNAL - exit_code if exit_code > _BY_SIGNAL else exit_code

    def trainer_ended(self, run: RunDir, exit_code: int) -> None:
        """Record that the run is paused if Slurm's signal ended the trainer before it handled signals."""
        if exit_code == -signal.SIGTERM:
            append_event(run.events_path, Paused(step=recorded_status(run).step, hold=Hold(cause="limit")))

    def requeue(self, run: RunDir) -> None:
        """Make Slurm start the job again; leave the run paused if it was cancelled or Slurm refuses."""
        paused, seen = recorded_status(run), self._seen()
        if seen is not None and "CANCELLED" in seen.states:
            self._leave_paused(run, paused, f"Slurm job {self._job} was canceled")
            return
        # Record this before the request, which ends this process.
        append_event(run.events_path, Queued())
        write_status(run, structs.replace(paused.transition("queued"), hold=Hold(cause="limit")))
        if seen is not None and seen.waits:
            # The job was preempted, or requeued by an administrator.
            return
        try:
            slurm.requeue(self._job)
        except UserError as problem:
            log(problem)
            self._leave_paused(run, paused, f"Slurm did not start job {self._job} again")
            return
        # Slurm ends this process. Until then, the job must not count as completed.
        signal.pause()

    def notify(self, run: RunDir) -> None:
        """Notify the user from this process, because a background process would end with the job."""
        notify(run.path)

    def _limit(self, run: RunDir, devices: Iterable[RunDevice]) -> Hold | None:
        return Hold(cause="limit") if self.is_told_to_leave else None

    def _leave_paused(self, run: RunDir, paused: Status, why: str) -> None:
        append_event(run.events_path, Paused(step=paused.step))
        detail = f"{why}: `qlora-tui resume {run.id}` submits the run again."
        write_status(run, structs.replace(paused, at=time.time(), detail=detail))

    def _seen(self) -> SeenJob | None:
        """Return the state of this job in Slurm; None if Slurm does not answer."""
        try:
            return slurm.list_jobs().get(self._job)
        except UserError as problem:
            log(problem)
            return None

    def _on_signal(self, number: int, frame: object) -> None:
        self.is_told_to_leave = True


def main() -> int:
    """Train the run in the given folder; return the exit code, which is 1 if the run failed."""
    run, job = RunDir(Path(sys.argv[1])), _Job(os.environ.get("SLURM_JOB_ID", ""))
    job.listen()
    state = recorded_status(run).state
    if state not in ("queued", *ACTIVE) and not (state == "paused" and _is_held(run)):
        # Slurm started the job again after its end, for example because a node failed.
        log(f"{run.id} is {state}: there is nothing to do")
        return 0
    try:
        record_job(run, os.environ.get("SLURM_JOB_ID", ""))
        _wait_for_last_trainer(run)
        devices = _devices(run)
        if isinstance(devices, UserError):
            job.refuse(run, devices)
        else:
            job.begin(run, devices)
    except UserError as problem:
        log(problem)
        return problem.exit_code
    except OSError as error:
        log(disk_problem(error) or error)
        return EXIT_FAILURE
    return EXIT_FAILURE if read_status(run).state == "failed" else 0


def _wait_for_last_trainer(run: RunDir) -> None:
    """Wait until no other trainer has the run. One may be alive on a node that Slurm cannot reach.

    Raises UserError if it continues to train.
    """
    deadline = time.monotonic() + 2 * OUTDATED_BEAT_S
    while has_live_trainer(run):
        if time.monotonic() > deadline:
            raise UserError(
                "The run is already training",
                what=f"{recorded_status(run).process} trains {run.id}.",
                fix="Wait until that trainer has ended. If the run is not finished then, resume it.",
            )
        time.sleep(POLL_S)


def _is_held(run: RunDir) -> bool:
    """Return whether the previous job paused the run at its time limit, but was killed before it was
    requeued.
    """
    ending = last_event(run.events_path)
    return isinstance(ending, Paused) and ending.hold is not None


def _devices(run: RunDir) -> Devices | UserError:
    """Return the devices that Slurm gave to the job, or the error if they are not enough for the run."""
    try:
        devices = choose(wanted_devices(run.recipe(), os.environ, devices_of(run)), set())
    except UserError as problem:
        return problem
    assert devices is not None, "nothing else is unavailable"
    return devices


if __name__ == "__main__":
    sys.exit(main())
