"""The queue: one empty file a waiting run, whose name gives the order.

``queue/<order>.<run id>``: moving is a rename, taking is an unlink, and a listing is the queue.
"""

from __future__ import annotations

import time
from pathlib import Path

from qlora_tui import paths
from qlora_tui.files import private_dir
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Queued, Stopped
from qlora_tui.runs.log import EventWriter
from qlora_tui.runs.status import read_status, write_status

_APART = 1_000_000_000
"""Between the orders of two runs: a second, in nanoseconds."""


def enqueue(run: RunDir) -> None:
    """Put a run at the end of the queue (once; a second call changes nothing)."""
    if run.id in waiting():
        return
    write_status(run, read_status(run).then("queued"), durable=True)
    last = max((_order(entry) for entry in _folder().iterdir()), default=0)
    # Behind the others also where the clock was set back.
    order = max(time.time_ns(), last + _APART)
    (_folder() / f"{order:020d}.{run.id}").touch(mode=0o600)


def enqueue_again(run: RunDir) -> None:
    """Queue a run that had ended, to go on from its last checkpoint."""
    with EventWriter(run.events_path) as log:
        log.append(Queued(at=time.time()))
    # Who queues it again knows how it ended.
    run.untold_path.unlink(missing_ok=True)
    enqueue(run)


def waiting() -> list[str]:
    """Ids of the waiting runs, the next one first."""
    return [entry.name.partition(".")[2] for entry in sorted(_folder().iterdir())]


def next_waiting() -> RunDir | None:
    """The run whose turn it is, left in the queue."""
    for name in waiting():
        return RunDir(paths.runs_dir() / name)
    return None


def remove(run: RunDir) -> bool:
    """Take a run out of the queue; False when it was not (or no longer) in it."""
    removed = False
    for entry in _folder().glob(f"*.{run.id}"):
        if entry.name.partition(".")[2] == run.id:
            entry.unlink(missing_ok=True)
            removed = True
    return removed


def withdraw(run: RunDir) -> bool:
    """Stop a run that has not begun; False when it was no longer waiting."""
    if not remove(run):
        return False
    set_aside(run, "Taken out of the queue.")
    return True


def set_aside(run: RunDir, why: str) -> None:
    """Make a run that has not begun a stopped one; ``why`` is its detail, a sentence."""
    status = read_status(run).then("stopped", detail=why)
    with EventWriter(run.events_path) as log:
        log.append(Stopped(at=status.at, step=status.step))
    write_status(run, status, durable=True)


def move(run: RunDir, places: int) -> None:
    """Move a waiting run by so many places: negative is sooner."""
    entries = sorted(_folder().iterdir())
    names = [entry.name.partition(".")[2] for entry in entries]
    if run.id not in names:
        return
    here = names.index(run.id)
    there = min(max(here + places, 0), len(names) - 1)
    if there == here:
        return
    orders = [_order(entry) for entry in entries]
    order = (
        _between(orders[there - 1] if there else 0, orders[there])
        if there < here
        else _between(orders[there], orders[there + 1] if there + 1 < len(orders) else orders[there] + _APART)
    )
    entries[here].rename(_folder() / f"{order:020d}.{run.id}")


def _order(entry: Path) -> int:
    return int(entry.name.partition(".")[0])


def _between(low: int, high: int) -> int:
    # Orders are nanoseconds of queueing, so between two there is always room for another.
    return (low + high) // 2


def _folder() -> Path:
    return private_dir(paths.state_dir() / "queue")
