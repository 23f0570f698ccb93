"""Deleted runs that can still be restored, until the app that deleted them exits.

``runs/.deleted/<owner>/<run id>``: inside the runs folder, so that deleting is a rename on the same disk.
The owner holds a lock while it runs; a folder whose lock is free is abandoned and can be deleted.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.files import private_dir
from qlora_tui.runs.actions import check_deletable
from qlora_tui.runs.directory import TRASH, RunDir
from qlora_tui.runs.exports import delete_unfinished

_LOCK = ".lock"


class Trash:
    """Runs that one app has deleted, the most recent on top."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._lock = -1
        self._deleted: list[str] = []

    def __len__(self) -> int:
        return len(self._deleted)

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._deleted

    def put(self, run: RunDir) -> None:
        """Move a run to the trash; raises UserError until it has ended, or on a disk error."""
        check_deletable(run)
        try:
            run.path.rename(self._own_folder() / run.id)
        except OSError as error:
            raise _disk("The run was not deleted", run.path, error) from error
        self._deleted.append(run.id)

    def restore(self) -> RunDir | None:
        """Restore the run that was deleted last; None if the trash is empty. Raises UserError."""
        if not self._deleted:
            return None
        run = RunDir(paths.runs_dir() / self._deleted[-1])
        try:
            (self._own_folder() / run.id).rename(run.path)
        except OSError as error:
            raise _disk("The run was not restored", run.path, error) from error
        self._deleted.pop()
        return run

    def empty(self) -> None:
        """Delete the contents permanently."""
        if self._folder is not None:
            _delete_runs(self._folder)
            os.close(self._lock)
            self._folder, self._lock, self._deleted = None, -1, []

    def _own_folder(self) -> Path:
        if self._folder is None:
            name = f"{time.time_ns()}-{os.getpid()}"
            # The folder appears under its name once locked, so that another app starting now leaves it alone.
            draft = private_dir(_home() / f".{name}")
            self._lock = os.open(draft / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._folder = draft.rename(_home() / name)
        return self._folder


def empty_abandoned() -> None:
    """Permanently delete the trash of apps that were killed."""
    if not _home().exists():
        return
    for folder in _home().glob("[!.]*"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _delete_runs(folder)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def _delete_runs(folder: Path) -> None:
    """Delete a trash and what the exports of its runs left unfinished."""
    for path in folder.glob("[!.]*"):
        delete_unfinished(RunDir(path))
    shutil.rmtree(folder, ignore_errors=True)


def _home() -> Path:
    return paths.runs_dir() / TRASH


def _disk(title: str, path: Path, error: OSError) -> UserError:
    return UserError(
        title, what=f"{path}: {error.strerror or error}.", fix="Check that you have write permission there."
    )
