"""The queue of runs: adding, removing and moving runs, and taking the next one.

``queue.json`` is the list of waiting runs, and is replaced as a whole. A run enters it after its status says
"queued", and leaves it after its status says "starting"; each write is synced. If a crash or a full disk
interrupts this, the run is still queued, or has ended and can be resumed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from msgspec import structs

from qlora_tui.files import atomic_write
from qlora_tui.remote.calls import changes_box
from qlora_tui.runs.directory import RunDir, queue_lock_path, queue_path, waiting
from qlora_tui.runs.event_log import append_event
from qlora_tui.runs.events import Paused, Queued, Stopped
from qlora_tui.runs.holds import Hold
from qlora_tui.runs.process import ProcessIdentity
from qlora_tui.runs.status import ACTIVE, Status, ended_status, is_stranded, read_status, write_status

__all__ = ["waiting"]


def enqueue(run: RunDir, *, first: bool = False) -> None:
    """Add a run at the end of the queue or, with ``first``, at the front. A second call changes nothing.
    Raises OSError.
    """
    _enter(run, again=False, first=first)


def requeue(run: RunDir, *, first: bool = False) -> None:
    """Queue an ended run, to continue from its last checkpoint. After an OSError the run is still ended.

    With ``first``, the run goes to the front of the queue.
    """
    _enter(run, again=True, first=first)


def hold(run: RunDir, reason: Hold | None) -> None:
    """Record why a queued run has to wait; None if nothing holds it. Raises OSError."""
    with queue_lock():
        status = read_status(run)
        if status.state == "queued" and status.hold != reason and not is_stranded(run):
            # The detail is derived by the reader, so it is not stored.
            write_status(run, structs.replace(status, hold=reason, detail=""))


def _enter(run: RunDir, *, again: bool, first: bool = False) -> None:
    with queue_lock():
        status = read_status(run)
        if status.state in ("queued", *ACTIVE) and not is_stranded(run):
            return
        if again:
            forget_requests(run)
        write_status(run, status.transition("queued"))
        if again:
            append_event(run.events_path, Queued())
        # The queue is written last, because a full disk would prevent removing the run from it.
        if run.id not in (ids := waiting()):
            _write([run.id, *ids] if first else [*ids, run.id])
        if again:
            # A caller that queues the run again knows how it ended. After a crash before this, the next
            # runner queues it.
            with suppress(OSError):
                run.unreported_path.unlink(missing_ok=True)


def forget_requests(run: RunDir) -> None:
    """Delete requests to a trainer that was killed before it accepted them."""
    for path in run.control_dir.glob("*.json"):
        # A folder in place of a request is never accepted as one.
        with suppress(OSError):
            path.unlink()


def take(run: RunDir, process: ProcessIdentity) -> None:
    """Take a run from the queue for the runner: its status becomes "starting"."""
    with queue_lock():
        write_status(run, read_status(run).transition("starting", process=process))
        _remove(run)


def remove(run: RunDir) -> bool:
    """Remove a run from the queue; return False if it was not (or no longer) queued."""
    with queue_lock():
        return _remove(run)


@changes_box
def cancel(run: RunDir) -> bool:
    """Stop a run that has not started; return False if it was no longer queued.

    If this raises OSError, the run is still queued. A full disk may prevent recording the stop, but a run
    that is in no queue reads as stopped anyway.
    """
    if run.id not in waiting():
        return False
    try:
        if not remove(run):
            return False
    except OSError:
        if run.id in waiting():
            raise
    with suppress(OSError):
        mark_not_queued(run, "Removed from the queue.")
    return True


@changes_box
def pause(run: RunDir) -> bool:
    """Remove a run from the queue until it is resumed; False if it was not queued. Raises OSError."""
    with queue_lock():
        status = read_status(run)
        if status.state != "queued" or is_stranded(run):
            return False
        mark_paused(run, status)
        return _remove(run)


def mark_paused(run: RunDir, status: Status) -> None:
    """Mark a queued run as paused at the step of ``status``. Raises OSError."""
    ending = Paused(step=status.step)
    append_event(run.events_path, ending)
    write_status(run, structs.replace(ended_status(ending), total_steps=status.total_steps, loss=status.loss))


def mark_not_queued(run: RunDir, why: str) -> None:
    """Mark a run that has not started as stopped. ``why`` becomes its detail, a sentence."""
    status = read_status(run).transition("stopped", detail=why)
    append_event(run.events_path, Stopped(at=status.at, step=status.step))
    write_status(run, status)


@changes_box
def move(run: RunDir, places: int) -> None:
    """Move a queued run by ``places``; negative numbers move it forward."""
    with queue_lock():
        ids = waiting()
        if run.id in ids:
            place = ids.index(run.id)
            ids.remove(run.id)
            ids.insert(max(place + places, 0), run.id)
            _write(ids)


@contextmanager
def queue_lock() -> Iterator[None]:
    """Lock the queue inside the block, so that the queue and a run's status change together for all writers.

    The lock should be held only to write a few files. Nothing is locked if the file system has no locks.
    """
    handle = os.open(queue_lock_path(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove(run: RunDir) -> bool:
    ids = waiting()
    if run.id not in ids:
        return False
    _write([name for name in ids if name != run.id])
    return True


def _write(ids: list[str]) -> None:
    atomic_write(queue_path(), json.dumps(ids), durable=True)
