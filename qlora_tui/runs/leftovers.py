"""Files and folders that killed processes left behind: drafts to delete, and previous folders to restore.

Only leftovers that demonstrably come from this program are deleted: folders with its marker that no process
holds (:mod:`qlora_tui.publishing`), and temporary files with its naming
(:func:`qlora_tui.files.atomic_write`) that are at least an hour old. The content of files in a run's folder
never decides what is deleted elsewhere.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.files import TEMPORARY, list_folder
from qlora_tui.publishing import (
    abandoned_in,
    delete_abandoned,
    final_path,
    kept_earlier,
    restore_earlier,
    unfinished_drafts,
)
from qlora_tui.runs.directory import RunDir

OLD_S = 3600.0
"""A temporary file that is older than this, in seconds, is a leftover. No write takes this long."""


def restore(run: RunDir) -> list[Path]:
    """Restore an adapter and checkpoints that were moved aside for a replacement that never appeared.

    To be called by the trainer that holds the run, or while no trainer does. Raises OSError.
    """
    return [final for final in moved_aside(run) if restore_earlier(final)]


def moved_aside(run: RunDir) -> list[Path]:
    """Return the paths of a missing adapter or checkpoint whose previous folder still exists."""
    finals = []
    for path in (*list_folder(run.path), *list_folder(run.checkpoints_dir)):
        final = final_path(path)
        if final != path and kept_earlier(final) is not None:
            finals.append(final)
    return finals


def sweep_own(run: RunDir) -> None:
    """Delete incomplete files that earlier trainers of this run left behind. Only the trainer that holds the
    run may call this.
    """
    for folder in (run.path, run.checkpoints_dir):
        for path in abandoned_in(folder):
            delete(path)


def sweep() -> list[Path]:
    """Delete all leftovers that no process uses, and return their paths."""
    swept = leftovers()
    for path in swept:
        delete(path)
    return swept


def leftovers() -> list[Path]:
    """Return all leftovers that :func:`sweep` would delete, in the runs folder and elsewhere."""
    # An export's draft may be found twice: in its list and in one of our folders.
    return list(dict.fromkeys(_leftovers()))


def _leftovers() -> Iterator[Path]:
    import tempfile  # The import takes 15 ms, which a start without leftovers avoids.

    # If there is no temporary folder, as on a full disk, it has no leftovers.
    with suppress(OSError):
        yield from abandoned_in(Path(tempfile.gettempdir()))
    yield from unfinished_drafts()
    for folder in _own_folders():
        yield from abandoned_in(folder)
        yield from (path for path in list_folder(folder) if _is_old_file(path))


def _own_folders() -> Iterator[Path]:
    """Yield every folder in which temporary files and folders are created, except folders of exports."""
    yield paths.state_dir()
    cache = paths.cache_dir()
    for folder in (cache, *list_folder(cache)):
        if folder.is_dir() and not folder.is_symlink():
            yield folder
    yield paths.sweeps_dir()
    yield from list_folder(paths.sweeps_dir())
    yield paths.runs_dir()
    for run in map(RunDir, list_folder(paths.runs_dir())):
        if not run.id.startswith(".") and run.path.is_dir():
            yield run.path
            yield run.checkpoints_dir


def _is_old_file(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    is_temporary = TEMPORARY.fullmatch(path.name) is not None and stat.S_ISREG(status.st_mode)
    return is_temporary and time.time() - status.st_mtime > OLD_S


def delete(path: Path) -> None:
    """Delete a leftover as far as possible. The rest only takes disk space."""
    with suppress(OSError, UserError):
        if TEMPORARY.fullmatch(path.name):
            path.unlink()
        else:
            delete_abandoned(path)
