"""Runs on a cluster: submits, cancels and watches their jobs.

A run on a cluster is in no queue of this machine. Slurm starts its job, which then owns the run. As for any
run, the state is in files. In addition, Slurm reports why a job waits, and if a job ended without recording
the ending of its run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from contextlib import suppress

import msgspec
from msgspec import structs

from qlora_tui.errors import UsageError, UserError
from qlora_tui.files import atomic_write
from qlora_tui.locks import locked
from qlora_tui.runs import run_queue, slurm
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import append_event
from qlora_tui.runs.events import Queued
from qlora_tui.runs.slurm import SeenJob, Submission, Target
from qlora_tui.runs.status import ACTIVE, read_status, recorded_status, write_status

ASK_S = 15.0
"""Minimum seconds between two calls of ``squeue``, over all processes that share the state folder."""


def is_on_cluster(run: RunDir) -> bool:
    """Return whether a cluster job trains this run, or trained it last."""
    return run.slurm_path.exists()


def submit(run: RunDir, name: str, target: Target, limit_s: int | None) -> str:
    """Submit a job that trains a run, from its last checkpoint if it has one; return the job id.

    Args:
        run: A new or ended run.
        name: Name of the target.
        target: Options of the job.
        limit_s: Time limit in seconds if the target has none; None for the cluster's default.

    Raises:
        UserError: Slurm refused the job; the state of the run is unchanged.
        OSError: A file could not be written.
    """
    before, is_again = recorded_status(run), run.status_path.exists()
    last = slurm.submission_of(run)
    atomic_write(
        run.job_script_path, slurm.job_script(run, target, limit_s, run.recipe().training.gpus), durable=True
    )
    submission = Submission(target=name, limit_s=limit_s)
    _record(run, submission)
    # Written before submission, because the job changes the status when it starts.
    write_status(run, before.transition("queued"))
    try:
        job = slurm.submit(run.job_script_path)
    except UserError:
        if is_again:
            write_status(run, before)
        if last is not None:
            _record(run, last)
        raise
    run.squeue_path.unlink(missing_ok=True)
    if is_again:
        run_queue.forget_requests(run)
        append_event(run.events_path, Queued())
    _record(run, structs.replace(submission, job=job))
    return job


def record_job(run: RunDir, job: str) -> None:
    """Record the job of this process, if the submitting process was killed before it knew the job id."""
    submission = slurm.submission_of(run)
    if submission is not None and not submission.job:
        _record(run, structs.replace(submission, job=job))


def _record(run: RunDir, submission: Submission) -> None:
    atomic_write(run.slurm_path, msgspec.json.encode(submission), durable=True)


def resubmit(run: RunDir) -> None:
    """Submit a new job for a run that has ended, to the same target. Raises UserError, OSError."""
    submission = slurm.submission_of(run)
    if submission is None:
        raise UserError(
            "The run's cluster is unknown",
            what=f"{run.slurm_path} cannot be read.",
            fix="Delete this file, then resume the run: it trains on this machine.",
        )
    refresh([run], is_due=True)
    seen = slurm.seen_job(run)
    # If the previous job is only ending its processes, the next job waits for it.
    is_in_use = seen is not None and (seen.waits or (seen.runs and recorded_status(run).state in ACTIVE))
    if seen is not None and is_in_use:
        raise UsageError(
            "The job has not ended",
            what=seen.words(submission.job),
            fix=f"Wait until the job has ended, or cancel it: `scancel {submission.job}`.",
        )
    submit(run, submission.target, slurm.load_target(submission.target), submission.limit_s)


def cancel(run: RunDir, *, pauses: bool) -> bool:
    """Cancel a job that has not started; return False if it has started. Raises UserError, OSError.

    With ``pauses``, the run is paused instead of stopped.
    """
    submission, status = slurm.submission_of(run), read_status(run)
    if submission is None or status.state != "queued":
        return False
    if not submission.job:
        raise UsageError(
            "The job is being submitted", what=f"{run.id} has no job yet.", fix="Try again in a minute."
        )
    slurm.cancel(submission.job)
    if pauses:
        run_queue.mark_paused(run, status)
    else:
        run_queue.mark_not_queued(run, f"Slurm job {submission.job} was canceled before it started.")
    return True


def refresh(runs: Iterable[RunDir], *, is_due: bool = False) -> None:
    """Ask Slurm for the jobs of these runs, and record changes in their ``squeue.json``.

    Does nothing within :data:`ASK_S` seconds of the last call (unless ``is_due``), or if Slurm does not
    answer.
    """
    asked = slurm.asked_path()
    with suppress(OSError, UserError), locked(asked) as lock:
        if lock is None or not slurm.is_installed():
            return
        if not is_due and lock.tell() and abs(time.time() - asked.stat().st_mtime) < ASK_S:
            return
        submissions = [
            (run, submission)
            for run in runs
            if (submission := slurm.submission_of(run)) is not None and submission.job
        ]
        if not submissions:
            return
        jobs = slurm.list_jobs()
        for run, submission in submissions:
            seen = jobs.get(submission.job, SeenJob(at=time.time()))
            before = slurm.seen_job(run)
            if before is None or structs.replace(before, at=seen.at) != seen:
                atomic_write(run.squeue_path, msgspec.json.encode(seen))
        lock.truncate(0)
        lock.write("asked\n")


def unsettled(runs: Iterable[RunDir]) -> list[RunDir]:
    """Return the runs on a cluster whose files do not record an ending."""
    states = ("queued", *ACTIVE)
    return [run for run in runs if is_on_cluster(run) and recorded_status(run).state in states]


class Watch:
    """Asks Slurm in a separate thread, for processes that must not wait for the answer."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._asked_at = -ASK_S

    def poll(self, runs: Iterable[RunDir]) -> None:
        """Start asking for the jobs of these runs, unless Slurm was asked recently or is being asked."""
        now = time.monotonic()
        if now - self._asked_at < ASK_S or (self._thread is not None and self._thread.is_alive()):
            return
        self._asked_at = now
        if (due := unsettled(runs)) and slurm.is_installed():
            self._thread = threading.Thread(target=refresh, args=(due,), name="squeue", daemon=True)
            self._thread.start()
