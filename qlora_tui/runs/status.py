"""A run's current state: ``status.json``, and how to interpret it after its process has ended.

``status.json`` is written at each change of state, and is on disk before anything relies on it. The heartbeat
is a separate file that is replaced once a second and never synced: a power cut may empty it, which loses only
the last second. If ``status.json`` cannot be read, the state is derived from the events.

Only the process that currently owns the run writes these files: the process that queues it, the runner, or
the trainer. All of them are on one machine (:func:`refuse_other_machines`). A run on a cluster is owned by
its job, wherever that runs (:mod:`qlora_tui.runs.slurm_job`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Struct, structs

from qlora_tui import paths
from qlora_tui.decoding import Count, UnixTime, decode_json, read_json
from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write, read_regular
from qlora_tui.formatting import capitalize, format_duration
from qlora_tui.locks import is_locked
from qlora_tui.remote.calls import current
from qlora_tui.runs import events
from qlora_tui.runs.directory import RunDir, all_runs, queue_lock_path, waiting
from qlora_tui.runs.event_log import last_event
from qlora_tui.runs.holds import Hold, hold_words
from qlora_tui.runs.process import ProcessIdentity, process_identity, runner_lock_path
from qlora_tui.runs.slurm import SUBMITTING_S, Submission, seen_job, submission_of, was_asked_lately

HEARTBEAT_S = 1.0
"""Seconds between two heartbeats of a trainer."""
SILENT_S = 30 * HEARTBEAT_S
"""Seconds without a heartbeat after which a live trainer counts as not responding."""
OUTDATED_BEAT_S = 60 * HEARTBEAT_S
"""Seconds after which a heartbeat is outdated, if its process cannot be looked up."""
State: TypeAlias = Literal[
    "queued", "starting", "running", "finished", "failed", "stopped", "paused", "lost", "unreadable", "gone"
]
"""State of a run. The last three are never written, only derived. ``gone``: the folder does not exist."""
ACTIVE: frozenset[State] = frozenset(("starting", "running"))
RESUMABLE: frozenset[State] = frozenset(("failed", "stopped", "paused", "lost"))
BROKEN: frozenset[State] = frozenset(("failed", "lost", "unreadable", "gone"))
"""States that are shown as errors: the run failed, was lost or deleted, or cannot be read."""


class Status(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The content of ``status.json``."""

    state: State
    at: UnixTime
    """Unix time at which this status was written. It also counts as the time of the last heartbeat."""
    process: ProcessIdentity | None = None
    phase: events.Phase | None = None
    step: Count = 0
    total_steps: Count = 0
    loss: float | None = None
    detail: str = ""
    """How the run ended or what it waits for, in one sentence."""
    micro_batch: Count = 0
    """Micro-batches of the current step that are done."""
    micro_batches: Count = 0
    """Micro-batches of the current step; 0 until the first one is done."""
    hold: Hold | None = None
    """Why a queued run waits, or a running run rests; None if a queued run waits only for earlier runs."""

    def transition(self, state: State, *, process: ProcessIdentity | None = None, detail: str = "") -> Status:
        """Return this status with a new state and the current time. The step, the number of steps and the
        loss are kept.
        """
        return structs.replace(
            self,
            state=state,
            at=time.time(),
            process=process,
            phase=None,
            detail=detail,
            micro_batch=0,
            micro_batches=0,
            hold=None,
        )


_DECODER = msgspec.json.Decoder(Status)


def write_status(run: RunDir, status: Status) -> None:
    """Replace ``status.json``; it survives a power cut. Delete the heartbeat unless the run is active.

    Raises OSError.
    """
    atomic_write(run.status_path, msgspec.json.encode(status), durable=True)
    if status.state not in ACTIVE:
        run.heartbeat_path.unlink(missing_ok=True)


def write_heartbeat(run: RunDir, status: Status) -> None:
    """Record that the process in ``status.json`` is alive, and its progress. Raises OSError."""
    atomic_write(run.heartbeat_path, msgspec.json.encode(status))


def read_status(run: RunDir) -> Status:
    """Return the actual status. An active run whose process has ended is ``lost``."""
    status = recorded_status(run)
    if current() is not None:
        # The remote box has already looked for the process.
        return status
    if status.state in ("queued", *ACTIVE) and (submission := submission_of(run)) is not None:
        return _status_of_job(run, status, submission)
    if status.state == "queued":
        if run.id in waiting():
            waits = capitalize(f"{held_words(status)}.") if status.hold else ""
            return structs.replace(status, detail=describe_runner() or waits or status.detail)
        # The process that holds the lock may be about to add the run to the queue.
        if not is_locked(queue_lock_path()) and is_stranded(run):
            return structs.replace(
                status,
                state="stopped",
                detail="The run's status was queued, but the run is not in the queue.",
            )
        # The runner may have taken it.
        status = recorded_status(run)
    if status.state not in ACTIVE:
        return status
    status, seen = _look_for_trainer(run, status)
    return structs.replace(
        status, state=status.state if seen.alive else "lost", detail=seen.detail or status.detail
    )


def has_live_trainer(run: RunDir) -> bool:
    """Return whether, according to the files, a process trains the run now, on this machine or another."""
    status = recorded_status(run)
    return status.state in ACTIVE and _look_for_trainer(run, status)[1].alive


def _look_for_trainer(run: RunDir, status: Status) -> tuple[Status, Sighting]:
    """Return the status with the last heartbeat, and what is known about the run's process."""
    beat = read_json(run.heartbeat_path, _DECODER)
    if beat is not None and beat.process == status.process:
        status = beat
    return status, find_trainer(status.process, run, status.at, beats=status.state == "running")


def _status_of_job(run: RunDir, status: Status, submission: Submission) -> Status:
    """Return the status of a run on a cluster, from its files and its job's last known state in Slurm."""
    job, seen = submission.job, seen_job(run)
    if status.state == "queued":
        if not job:
            if abs(time.time() - status.at) < SUBMITTING_S:
                return structs.replace(status, detail="The run is being submitted to Slurm.")
            return structs.replace(status, state="stopped", detail="The run was not submitted to Slurm.")
        if seen is not None and seen.is_over and seen.at > status.at:
            return structs.replace(status, state="stopped", detail=seen.words(job))
        said = seen.words(job) if seen is not None else f"Slurm job {job} was submitted."
        return structs.replace(status, detail=said)
    status, trainer = _look_for_trainer(run, status)
    if trainer.alive:
        mark = status.process
        where = f"On {mark.host if mark else 'a node'}, Slurm job {job}."
        is_told = mark is None or mark.is_from_this_host
        return structs.replace(status, detail=(trainer.detail if is_told else "") or where)
    if seen is None or not was_asked_lately():
        return structs.replace(status, state="lost", detail=trainer.detail)
    if seen.waits and seen.at > status.at:
        # Slurm restarts a job whose node failed.
        return structs.replace(status, state="queued", detail=seen.words(job))
    if seen.runs:
        return structs.replace(status, detail=f"{seen.words(job)} Its trainer does not respond.")
    return structs.replace(status, state="lost", detail=seen.words(job))


def held_words(status: Status) -> str:
    """Describe the hold of a run, such as ``paused until 23:00 (hours)``; empty if it has none."""
    if status.hold is None:
        return ""
    how = "resting" if status.state in ACTIVE else "paused" if status.step else "waiting"
    return f"{how} {hold_words(status.hold)}"


def refuse_other_machines() -> None:
    """Raise UserError if another machine is training a run from this state folder, since both machines would
    take runs from the same queue.
    """
    for run in all_runs():
        status = read_status(run)
        mark = status.process
        if submission_of(run) is not None:
            # Such a run is in no queue.
            continue
        if status.state in ACTIVE and mark and not (mark.is_from_this_host or mark.is_from_this_boot):
            raise UserError(
                "Another machine uses the state folder",
                what=f"{mark.host} is training {run.id} in {paths.state_dir()}.",
                why="Two machines that share a state folder would take the same runs from the queue.",
                fix="Point XDG_STATE_HOME at a folder that only this machine uses, or wait until that "
                "run has ended.",
            )


class Sighting(NamedTuple):
    """What is known about a process."""

    alive: bool
    detail: str = ""
    """One sentence; empty if there is nothing to report."""


def find_trainer(mark: ProcessIdentity | None, run: RunDir, beat_at: float, *, beats: bool) -> Sighting:
    """Look for the process of an active run.

    Args:
        mark: The process that the status names.
        run: The run.
        beat_at: Unix time of the last heartbeat.
        beats: Whether the process writes a heartbeat. The trainer does; the runner that starts it does not.
    """
    if mark is None:
        return Sighting(False, "The status names no process.")
    if not mark.is_from_this_host:
        is_recent = abs(time.time() - beat_at) < OUTDATED_BEAT_S
        if not mark.is_from_this_boot:
            if is_recent:
                return Sighting(True, f"Running on another machine ({mark.host}).")
            return Sighting(False, f"The run was on another machine ({mark.host}): {_silence(beat_at)}")
        held = is_locked(run.trainer_lock_path) if beats else None
        # A runner does not hold the run's lock, and some file systems have no locks.
        is_alive = is_recent if held is None else held
        where = f"in another container ({mark.host})"
        return Sighting(is_alive, f"Running {where}." if is_alive else f"The process {where} is gone.")
    if not mark.is_from_this_boot:
        return Sighting(False, "The machine was restarted during the run.")
    state = mark.state
    if state in ("", "Z", "X"):
        return Sighting(False, "Probably killed: the process ended without an exit record.")
    if state in ("T", "t"):
        return Sighting(True, f"Suspended: `kill -CONT {mark.pid}` continues the process.")
    if beats and abs(time.time() - beat_at) > SILENT_S:
        waits = " The process is waiting for a disk or another device." if state == "D" else ""
        return Sighting(True, f"Not responding: {_silence(beat_at)}{waits}")
    return Sighting(True)


def describe_runner() -> str:
    """Describe, in a sentence, what prevents the runner from taking runs; empty if no obstacle is known."""
    try:
        pid = int(read_regular(runner_lock_path(), 32))
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = process_identity(pid).state
    except (OSError, ValueError):
        return ""
    if b"qlora_tui.runs.runner" not in command or state not in ("T", "t"):
        return ""
    return f"The runner is suspended: `kill -CONT {pid}` continues it."


def _silence(beat_at: float) -> str:
    age_s = time.time() - beat_at
    since = f"for {format_duration(age_s)}" if age_s >= 0 else "since the clock was set back"
    return f"no heartbeat {since}."


def is_stranded(run: RunDir) -> bool:
    """Return whether the run's recorded state is ``queued`` although the run is not in the queue or, if it
    was submitted to a cluster, although no job waits for it.

    Unless the caller holds the lock of the queue, the result can also be True while another process is adding
    the run to the queue.
    """
    if submission_of(run) is not None:
        return recorded_status(run).state == "queued" and read_status(run).state == "stopped"
    # In this order, because a run leaves the queue after its state has changed.
    return run.id not in waiting() and recorded_status(run).state == "queued"


def status_problem(run: RunDir) -> str | None:
    """Return why ``status.json`` cannot be read, in a clause; None if it can be read."""
    try:
        _decoded(run.status_path)
    except (OSError, msgspec.MsgspecError) as error:
        return _reason(error)
    return None


def recorded_status(run: RunDir) -> Status:
    """Return the status as last written. If it cannot be read, derive it from the events."""
    try:
        return _decoded(run.status_path)
    except (OSError, msgspec.MsgspecError) as error:
        if not run.path.exists():
            return Status(state="gone", at=0.0, detail="The run was deleted: its folder is gone.")
        return _without_status(run, error)


def _decoded(path: Path) -> Status:
    return decode_json(read_regular(path), _DECODER)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "status.json is missing"
    return f"status.json cannot be read ({error})"


def ended_status(ending: events.RunEnded) -> Status:
    """Return the status of a run that ended with this event."""
    match ending:
        case events.Finished():
            return Status(state="finished", at=ending.at, step=ending.step, detail=ending.reason)
        case events.Failed():
            return Status(state="failed", at=ending.at, detail=f"{ending.title}: {ending.what}")
        case events.Stopped():
            detail = f"Stopped at step {ending.step:,}."
            return Status(state="stopped", at=ending.at, step=ending.step, detail=detail)
        case events.Paused():
            detail = f"Paused at step {ending.step:,}{f' {hold_words(ending.hold)}' if ending.hold else ''}."
            return Status(state="paused", at=ending.at, step=ending.step, detail=detail)


def _without_status(run: RunDir, error: Exception) -> Status:
    """Return the status derived from heartbeat and events, for an unreadable ``status.json``."""
    if not run.recipe_path.is_file():
        return Status(
            state="unreadable", at=0.0, detail=f"{_reason(error)}; recipe.toml cannot be read either."
        )
    beat = read_json(run.heartbeat_path, _DECODER)
    if beat is not None and find_trainer(beat.process, run, beat.at, beats=True).alive:
        return beat
    try:
        event = last_event(run.events_path)
    except OSError:
        event = None
    match event:
        case None | events.Queued():
            return Status(state="queued", at=event.at if event else 0.0)
        case events.Finished() | events.Failed() | events.Stopped() | events.Paused():
            return ended_status(event)
        case events.Step() | events.CheckpointSaved():
            return Status(state="running", at=event.at, step=event.step)
        case _:
            return Status(state="running", at=event.at)
