"""Deleted runs that can be restored for a week, whatever happens to the app that deleted them.

``runs/.deleted/<run id>``: inside the runs folder, so that deleting is a rename on the same disk. The file
``deleted`` in the run's folder has the time; without it a folder is not ours to delete.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from qlora_tui import paths
from qlora_tui.drafts import discard
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.files import atomic_write, private_dir, read_regular, sync
from qlora_tui.runs.actions import check_deletable
from qlora_tui.runs.directory import TRASH, RunDir
from qlora_tui.runs.exports import delete_unfinished

KEPT_DAYS = 7
KEPT_S = KEPT_DAYS * 24 * 3600.0
"""Time for which a deleted run can be restored, in seconds."""
_TIME = "deleted"
_OWNER = re.compile(r"\d+-\d+")
"""Version 1.0 had a folder with such a name for each app."""


@dataclass(frozen=True)
class TrashedRun:
    """A deleted run that can be restored."""

    run: RunDir
    """Its folder in the trash."""
    deleted_at: float
    """Unix time."""

    @property
    def age_s(self) -> float:
        """Seconds since its deletion; 0 if the clock was set back."""
        return max(0.0, time.time() - self.deleted_at)

    @property
    def size_bytes(self) -> int:
        """Room that it takes; a file that cannot be looked at counts nothing."""
        size = 0
        for folder, _, names in os.walk(self.run.path):
            for name in names:
                with suppress(OSError):
                    size += (Path(folder) / name).lstat().st_size
        return size


def put(run: RunDir) -> None:
    """Move a run to the trash; raises UserError until it has ended, or on a disk error."""
    check_deletable(run)
    trashed = private_dir(_home()) / run.id
    try:
        atomic_write(run.path / _TIME, f"{int(time.time())}\n")
        run.path.rename(trashed)
        sync(trashed.parent)
        sync(run.path.parent)
    except OSError as error:
        with suppress(OSError):
            (run.path / _TIME).unlink(missing_ok=True)
        raise _disk("The run was not deleted", run.path, error) from error


def trashed_runs() -> list[TrashedRun]:
    """Return every run that can be restored, the one deleted last first."""
    folders: list[Path] = []
    for path in _listed(_home()):
        folders += _listed(path) if _OWNER.fullmatch(path.name) else [path]
    return sorted(
        (TrashedRun(RunDir(path), _deleted_at(path)) for path in folders if _is_run(path)),
        key=lambda each: each.deleted_at,
        reverse=True,
    )


def total_bytes() -> int:
    """Return the room that all runs in the trash take."""
    return sum(trashed.size_bytes for trashed in trashed_runs())


def restore(run_id: str) -> RunDir:
    """Move a run out of the trash, by its id, its name or the beginning of either. Raises UserError."""
    trashed = _find(run_id)
    run = RunDir(paths.runs_dir() / trashed.run.id)
    if os.path.lexists(run.path):
        raise UserError("The run was not restored", what=f"{run.path} exists.", fix="Rename that folder.")
    try:
        trashed.run.path.rename(run.path)
        sync(run.path.parent)
    except OSError as error:
        raise _disk("The run was not restored", run.path, error) from error
    # It counts only in the trash.
    with suppress(OSError):
        (run.path / _TIME).unlink(missing_ok=True)
    return run


def empty(older_than_s: float = 0.0) -> list[TrashedRun]:
    """Delete runs in the trash for good, and what their exports left unfinished; return those deleted.

    A run that cannot be deleted stays in the trash. Only those with the time of their deletion are deleted
    by age.
    """
    deleted = []
    for trashed in trashed_runs():
        path = trashed.run.path
        has_time = (path / _TIME).is_file()
        if not has_time and not _OWNER.fullmatch(path.parent.name):
            continue  # not put there by this program
        if older_than_s and not (has_time and trashed.age_s > older_than_s):
            continue
        delete_unfinished(trashed.run)
        with suppress(OSError):
            discard(trashed.run.path)
            deleted.append(trashed)
    return deleted


def _find(run_id: str) -> TrashedRun:
    trashed = trashed_runs()
    matches = (
        [each for each in trashed if each.run.id == run_id]
        or [each for each in trashed if each.run.name == run_id]
        or [each for each in trashed if each.run.id.startswith(run_id)]
    )
    if len(matches) == 1:
        return matches[0]
    what = f"{len(matches)} deleted runs begin with {run_id!r}." if matches else f"{run_id!r} is not in it."
    raise UserError(
        "Not in the trash", what=what, fix="`qlora-tui runs trash` lists what is.", exit_code=EXIT_USAGE
    )


def _is_run(path: Path) -> bool:
    is_run = (path / _TIME).is_file() or RunDir(path).recipe_path.exists()
    return path.is_dir() and not path.name.startswith(".") and is_run


def _deleted_at(path: Path) -> float:
    with suppress(OSError, ValueError):
        if isfinite(deleted_at := float(read_regular(path / _TIME, 64))):
            return deleted_at
    # A rename changes this time.
    return path.lstat().st_ctime


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _home() -> Path:
    return paths.runs_dir() / TRASH


def _disk(title: str, path: Path, error: OSError) -> UserError:
    return UserError(
        title, what=f"{path}: {error.strerror or error}.", fix="Check that you have write permission there."
    )
