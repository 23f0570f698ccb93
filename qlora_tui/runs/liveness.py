"""Whether an active run's process is still working, and how to describe it.

A process of this machine is looked up. One in another container on the same kernel is judged by the lock that
a trainer holds and by its heartbeat, one on another machine by its heartbeat alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from qlora_tui.files import read_regular
from qlora_tui.formatting import format_duration
from qlora_tui.locks import is_locked
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.process import ProcessIdentity, machine_id, process_identity
from qlora_tui.runs.spawn import runner_lock_path

BEAT_S = 60.0
"""Age in seconds after which a heartbeat counts as the last, if its process cannot be looked up."""
SILENT_S = 30.0
"""Age in seconds of a live trainer's heartbeat after which it counts as not responding."""


class Sighting(NamedTuple):
    """What is known about a process."""

    alive: bool
    detail: str = ""
    """One sentence; empty if there is nothing to report."""


_beats: dict[Path, tuple[float, float]] = {}
"""Last heartbeat of each run, and when this process saw it change, by its own monotonic clock. A heartbeat
that changes proves a live process, however much the clocks of two machines differ.
"""


def find_trainer(mark: ProcessIdentity | None, run: RunDir, beat_at: float, *, beats: bool) -> Sighting:
    """Look for the process of an active run.

    Args:
        mark: The process that the status names.
        run: The run.
        beat_at: Unix time of the last heartbeat, by the clock of its writer.
        beats: Whether the process writes a heartbeat: the trainer does, the runner that starts it does not.
    """
    if mark is None:
        return Sighting(False, "Its status has no process.")
    moved = _has_moved(run, beat_at)
    if mark.is_visible:
        return _here(mark, run, beat_at, beats=beats and not moved)
    named = f" ({mark.host})" if mark.host else ""
    if mark.is_from_this_boot:
        held = is_locked(run.trainer_lock_path)
        # A runner holds no lock on the run, and some file systems have none.
        alive = held if held is not None and beats else moved or _is_recent(run, beat_at)
        where = f"in another container{named}"
        return Sighting(bool(alive), f"Running {where}." if alive else f"Its process {where} is gone.")
    if mark.machine == machine_id():
        return Sighting(False, "The machine was restarted while it ran.")
    if moved or _is_recent(run, beat_at):
        return Sighting(True, f"Running on another machine{named}.")
    if mark.is_of_this_machine:
        return Sighting(False, "The machine was restarted while it ran.")
    return Sighting(False, f"It ran on another machine{named}: no heartbeat for {_age(beat_at)}.")


def describe_runner() -> str:
    """Describe what keeps the runner from taking runs, in a sentence; empty if nothing is known to."""
    try:
        pid = int(read_regular(runner_lock_path(), 32))
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = process_identity(pid).state
    except (OSError, ValueError):
        return ""
    if b"qlora_tui.runs.runner" not in command or state not in ("T", "t"):
        return ""
    return f"The runner is suspended: `kill -CONT {pid}` continues it."


def _here(mark: ProcessIdentity, run: RunDir, beat_at: float, *, beats: bool) -> Sighting:
    state = mark.state
    if not mark.start_ticks and state in ("", "Z", "X") and is_locked(run.trainer_lock_path):
        # An older version recorded only a time, and the clock was set since.
        state = "S"
    if state in ("", "Z", "X"):
        return Sighting(False, "Its process is gone without an exit record; it was probably killed.")
    if state in ("T", "t"):
        return Sighting(True, f"Suspended: `kill -CONT {mark.pid}` continues its process.")
    if beats and time.time() - beat_at > SILENT_S:
        waits = " It waits for a disk or a device." if state == "D" else ""
        return Sighting(True, f"Not responding: no heartbeat for {_age(beat_at)}.{waits}")
    return Sighting(True)


def _has_moved(run: RunDir, beat_at: float) -> bool:
    """Whether this process has recently seen the heartbeat change."""
    now = time.monotonic()
    last, moved_at = _beats.get(run.path, (beat_at, -BEAT_S))
    if last != beat_at:
        moved_at = now
    _beats[run.path] = (beat_at, moved_at)
    return now - moved_at < SILENT_S


def _is_recent(run: RunDir, beat_at: float) -> bool:
    """Whether the heartbeat is recent, by the writer's clock or by the file system's."""
    try:
        changed_at = run.heartbeat_path.stat().st_mtime
    except OSError:
        changed_at = beat_at
    return any(abs(time.time() - at) < BEAT_S for at in (beat_at, changed_at))


def _age(beat_at: float) -> str:
    return format_duration(max(0.0, time.time() - beat_at))
