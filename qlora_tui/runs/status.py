"""A run's current state: ``status.json``, and how to read it after its process has ended.

``status.json`` is written at each change of state and is on disk before anything relies on it. The
heartbeat is a separate file, replaced once a second and never synced: a power cut may empty it, and loses
no more than the last second. If ``status.json`` cannot be read, the state is derived from the events.

Written by the one process that currently owns the run: the one that queues it, the runner, or the trainer.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
from msgspec import Struct, structs

from qlora_tui.decoding import Count, UnixTime, decode_json
from qlora_tui.files import atomic_write, read_regular
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import last_event
from qlora_tui.runs.events import CheckpointSaved, Failed, Finished, Paused, Phase, Queued, Step, Stopped
from qlora_tui.runs.liveness import describe_runner, find_trainer
from qlora_tui.runs.process import ProcessIdentity
from qlora_tui.runs.queue_entries import entries_of

State: TypeAlias = Literal[
    "queued", "starting", "running", "finished", "failed", "stopped", "paused", "lost", "unreadable", "gone"
]
"""The last three are never written, only derived on reading. ``gone``: the folder does not exist."""

ACTIVE: frozenset[State] = frozenset(("starting", "running"))
RESUMABLE: frozenset[State] = frozenset(("failed", "stopped", "paused", "lost"))


class Status(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The content of ``status.json``."""

    state: State
    at: UnixTime
    """Unix time when this was written: the heartbeat."""
    process: ProcessIdentity | None = None
    phase: Phase | None = None
    step: Count = 0
    total_steps: Count = 0
    loss: float | None = None
    detail: str = ""
    """One sentence: how it ended, or what it waits for."""
    micro_batch: Count = 0
    """Micro-batches done of the step in progress."""
    micro_batches: Count = 0
    """Micro-batches of that step; 0 until the first is done."""

    def transition(self, state: State, *, process: ProcessIdentity | None = None, detail: str = "") -> Status:
        """Return the next state, starting now; the run's progress is kept."""
        return structs.replace(
            self,
            state=state,
            at=time.time(),
            process=process,
            phase=None,
            detail=detail,
            micro_batch=0,
            micro_batches=0,
        )


_DECODER = msgspec.json.Decoder(Status)


def write_status(run: RunDir, status: Status) -> None:
    """Replace ``status.json``; it survives a power cut. Raises OSError."""
    atomic_write(run.status_path, msgspec.json.encode(status), durable=True)
    if status.state not in ACTIVE:
        run.heartbeat_path.unlink(missing_ok=True)


def write_heartbeat(run: RunDir, status: Status) -> None:
    """Record that the process in ``status.json`` is alive, and its progress. Raises OSError."""
    atomic_write(run.heartbeat_path, msgspec.json.encode(status))


def read_status(run: RunDir) -> Status:
    """Read the actual status: an active run whose process has ended is ``lost``."""
    status = _state_from_events(run)
    if status.state == "queued":
        if not entries_of(run.id):
            return structs.replace(status, state="stopped", detail="It was queued and is not in the queue.")
        return structs.replace(status, detail=describe_runner() or status.detail)
    if status.state not in ACTIVE:
        return status
    beat = _heartbeat(run)
    if beat is not None and beat.process == status.process:
        status = beat
    seen = find_trainer(status.process, run, status.at, beats=status.state == "running")
    return structs.replace(
        status, state=status.state if seen.alive else "lost", detail=seen.detail or status.detail
    )


def is_stranded(run: RunDir) -> bool:
    """Whether the run's last recorded state is queued, but it is not in the queue."""
    return _state_from_events(run).state == "queued" and not entries_of(run.id)


def status_problem(run: RunDir) -> str | None:
    """Describe why ``status.json`` cannot be read, in a clause; None if it can."""
    try:
        _decoded(run.status_path)
    except (OSError, msgspec.MsgspecError) as error:
        return _reason(error)
    return None


def _state_from_events(run: RunDir) -> Status:
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


def _heartbeat(run: RunDir) -> Status | None:
    try:
        return _decoded(run.heartbeat_path)
    except (OSError, msgspec.MsgspecError):
        return None


def _without_status(run: RunDir, error: Exception) -> Status:
    """Derive the status from heartbeat and events, for an unreadable ``status.json``."""
    if not run.recipe_path.is_file():
        return Status(
            state="unreadable", at=0.0, detail=f"{_reason(error)}; recipe.toml cannot be read either."
        )
    beat = _heartbeat(run)
    if beat is not None and find_trainer(beat.process, run, beat.at, beats=True).alive:
        return beat
    try:
        event = last_event(run.events_path)
    except OSError:
        event = None
    match event:
        case None | Queued():
            return Status(state="queued", at=event.at if event else 0.0)
        case Finished():
            return Status(state="finished", at=event.at, step=event.step, detail=event.reason)
        case Failed():
            return Status(state="failed", at=event.at, detail=f"{event.title}: {event.what}")
        case Stopped():
            return Status(
                state="stopped", at=event.at, step=event.step, detail=f"Stopped at step {event.step}."
            )
        case Paused():
            return Status(
                state="paused", at=event.at, step=event.step, detail=f"Paused at step {event.step}."
            )
        case Step() | CheckpointSaved():
            return Status(state="running", at=event.at, step=event.step)
        case _:
            return Status(state="running", at=event.at)
