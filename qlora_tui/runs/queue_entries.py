"""The queue's folder: one empty file per queued run, ``<order>.<run id>``, and a lock that its writers hold.

Names of any other form in it are not ours and are left alone.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qlora_tui import paths

_NAME = re.compile(r"([0-9]{20})\.([^./][^/]*)")


@dataclass(frozen=True, order=True)
class Entry:
    """A run's place in the queue."""

    order: int
    """Unix time of queueing, in nanoseconds, unless it was moved; the lowest is next."""
    run_id: str

    @property
    def path(self) -> Path:
        """Path of the entry's file."""
        return queue_dir() / f"{self.order:020d}.{self.run_id}"


def entries() -> list[Entry]:
    """Return every entry in the queue, the next one first."""
    return sorted(entry for listed in _listed() if (entry := _parsed(listed)) is not None)


def entries_of(run_id: str) -> list[Entry]:
    """Return a run's entries: one, or none if it is not queued."""
    return [entry for entry in entries() if entry.run_id == run_id]


def stray_names() -> list[str]:
    """Return names in the folder that are not queue entries."""
    return sorted(entry.name for entry in _listed() if _parsed(entry) is None)


def queue_dir() -> Path:
    """Path of the queue's folder, which the first entry creates: reading works on a read-only disk too."""
    return paths.state_dir() / "queue"


@contextmanager
def queue_lock() -> Iterator[None]:
    """Hold the queue's lock: a run's entry and its status change together for every other writer.

    Held only while a few files are written. Without locks in the file system, nothing is held.
    """
    handle = os.open(paths.state_dir() / "queue.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _listed() -> list[os.DirEntry[str]]:
    try:
        with os.scandir(queue_dir()) as listed:
            return list(listed)
    except FileNotFoundError:
        return []


def _parsed(entry: os.DirEntry[str]) -> Entry | None:
    match = _NAME.fullmatch(entry.name)
    if match is None or not entry.is_file(follow_symlinks=False):
        return None
    return Entry(int(match[1]), match[2])
