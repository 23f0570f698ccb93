"""The queue: the next run, and adding, removing and moving runs.

A run is queued while its entry exists (:mod:`qlora_tui.runs.queue_entries`): moving is a rename, taking is an
unlink.
The entry is written before the status says "queued" and removed after it says "starting", each synced: a run
that a crash caught in between stays queued.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from qlora_tui.files import private_dir, sync
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Queued, Stopped
from qlora_tui.runs.process import ProcessIdentity
from qlora_tui.runs.queue_entries import Entry, entries, entries_of, queue_dir, queue_lock
from qlora_tui.runs.status import ACTIVE, read_status, write_status

ORDER_GAP_NS = 1_000_000_000
"""Distance between the orders of two runs: one second, in nanoseconds."""


def enqueue(run: RunDir) -> None:
    """Append a run to the queue (once; a second call changes nothing). Raises OSError."""
    _enter(run, again=False)


def requeue(run: RunDir) -> None:
    """Queue an ended run, to continue from its last checkpoint. Raises OSError; the run then stays ended."""
    _enter(run, again=True)
    # The caller that queues it again knows how it ended.
    run.unreported_path.unlink(missing_ok=True)


def _enter(run: RunDir, *, again: bool) -> None:
    with queue_lock():
        line = entries()
        # Behind the others even if the clock was set back.
        order = max(time.time_ns(), max((entry.order for entry in line), default=0) + ORDER_GAP_NS)
        # A crash may have come between an entry and its status.
        entry = next((entry for entry in line if entry.run_id == run.id), Entry(order, run.id))
        status = read_status(run)
        if entry in line and status.state in ("queued", *ACTIVE):
            return
        try:
            if again:
                _forget_requests(run)
            if entry not in line:
                _create(entry)
            write_status(run, status.transition("queued"))
            if again:
                with EventWriter(run.events_path) as log:
                    log.append(Queued(at=time.time()))
        except OSError:
            _unlink([entry])
            raise


def _forget_requests(run: RunDir) -> None:
    """Delete requests to a trainer that was killed before it took them."""
    for path in run.control_dir.glob("*.json"):
        # A folder among them is not a request, and is never taken for one.
        with suppress(OSError):
            path.unlink()


def take(run: RunDir, process: ProcessIdentity) -> None:
    """Take a run for the runner: its status becomes "starting" and it leaves the queue."""
    with queue_lock():
        write_status(run, read_status(run).transition("starting", process=process))
        _unlink(entries_of(run.id))


def waiting() -> list[str]:
    """Return ids of the queued runs, the next one first."""
    return list(dict.fromkeys(entry.run_id for entry in entries()))


def remove(run: RunDir) -> bool:
    """Remove a run from the queue; False if it was not (or no longer) queued."""
    with queue_lock():
        return _unlink(entries_of(run.id))


def cancel(run: RunDir) -> bool:
    """Stop a run that has not started; False if it was no longer queued.

    Raises OSError if it is still queued. A full disk may prevent recording the stop: a run in no queue reads
    as stopped all the same.
    """
    if not entries_of(run.id):
        return False
    try:
        if not remove(run):
            return False
    except OSError:
        if entries_of(run.id):
            raise
        if read_status(run).state in ACTIVE:
            return False
    with suppress(OSError):
        mark_not_queued(run, "Taken out of the queue.")
    return True


def mark_not_queued(run: RunDir, why: str) -> None:
    """Mark a run that has not started as stopped; ``why`` is its detail, a sentence."""
    status = read_status(run).transition("stopped", detail=why)
    with EventWriter(run.events_path) as log:
        log.append(Stopped(at=status.at, step=status.step))
    write_status(run, status)


def move(run: RunDir, places: int) -> None:
    """Move a queued run by ``places``; negative is sooner."""
    with queue_lock():
        line = entries()
        here = next((place for place, entry in enumerate(line) if entry.run_id == run.id), None)
        if here is None:
            return
        there = min(max(here + places, 0), len(line) - 1)
        if there == here:
            return
        others = line[:here] + line[here + 1 :]
        order = _order_at(others, there)
        if order is None:
            others = _spread_out(others)
            order = _order_at(others, there)
        assert order is not None
        line[here].path.rename(Entry(order, run.id).path)
        sync(queue_dir())


def _order_at(line: list[Entry], place: int) -> int | None:
    """Order between the entries before and after ``place``; None if there is no gap."""
    low = line[place - 1].order if place else 0
    high = line[place].order if place < len(line) else low + 2 * ORDER_GAP_NS
    return (low + high) // 2 if high - low > 1 else None


def _spread_out(line: list[Entry]) -> list[Entry]:
    """Renumber the entries one second apart, the last one first, so that none overtakes another meanwhile."""
    last = line[-1].order
    spread = [Entry(last + place * ORDER_GAP_NS, entry.run_id) for place, entry in enumerate(line, 1)]
    for entry, moved in reversed(list(zip(line, spread, strict=True))):
        entry.path.rename(moved.path)
    return spread


def _create(entry: Entry) -> None:
    private_dir(queue_dir())
    os.close(os.open(entry.path, os.O_WRONLY | os.O_CREAT, 0o600))
    sync(queue_dir())


def _unlink(removed: list[Entry]) -> bool:
    for entry in removed:
        entry.path.unlink(missing_ok=True)
    if removed:
        sync(queue_dir())
    return bool(removed)
