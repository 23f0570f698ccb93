"""Leftovers of killed processes in the runs folder: drafts to delete, previous folders to restore.

Temporary views of models are in the system's temporary folder, and drafts of exports beside what they export.

Only files that no process can be writing are touched. The trainer holds its run, so an earlier trainer's
leftovers can go when the next one starts; an export holds its draft. Anything else must be an hour old,
belong to a run that is not in training, and come from a process that has ended.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.files import restore_earlier
from qlora_tui.runs.directory import DRAFT, TRASH, RunDir
from qlora_tui.runs.drafts import (
    can_continue,
    delete_abandoned,
    draft_path,
    is_abandoned,
    unfinished_drafts,
)
from qlora_tui.runs.exports import output_path, read_exports
from qlora_tui.runs.status import ACTIVE, read_status

OLD_S = 3600.0
"""Age in seconds of a leftover; no write takes so long."""
_EARLIER = re.compile(r"\.(.+)\.earlier")
_TEMPORARY = re.compile(r"\.(status\.json|heartbeat\.json|recipe\.toml|name)\.\w+")
CHECKPOINT_DRAFT = ".writing-"
"""Name prefix of an incomplete checkpoint folder; the checkpoint's name follows."""
VIEW = "qlora-tui-view-"
"""Name prefix of a temporary folder of links to a model; its process's PID follows."""


def restore(run: RunDir) -> list[Path]:
    """Restore an adapter and checkpoints that were moved aside for a replacement that is missing.

    For the trainer that holds the run, or while no trainer does. Raises OSError.
    """
    return [final for final in moved_aside(run) if restore_earlier(final)]


def moved_aside(run: RunDir) -> list[Path]:
    """Paths of a missing adapter or checkpoint whose previous folder still exists."""
    places = (
        parent / match[1]
        for parent in (run.path, run.checkpoints_dir)
        for path in _listed(parent)
        if (match := _EARLIER.fullmatch(path.name))
    )
    return [final for final in places if not final.exists()]


def sweep_own(run: RunDir) -> None:
    """Delete what an earlier trainer of this run left half written. For the trainer that holds the run."""
    for path in _trainers_drafts(run):
        delete(path)


def sweep() -> list[Path]:
    """Delete all leftovers that are old enough and that no process uses; return their paths."""
    swept = list(leftovers())
    for path in swept:
        delete(path)
    return swept


def leftovers() -> Iterator[Path]:
    """Yield all leftovers, in the runs folder and elsewhere, that :func:`sweep` would delete."""
    yield from _views()
    yield from _drafts_of_exports()
    for path in _listed(paths.runs_dir()):
        if path.name.startswith("."):
            if path.name != TRASH and path.is_dir() and _is_old(path) and not _lives(path.name):
                yield path
        elif path.is_dir():
            yield from leftovers_of(RunDir(path))


def _views() -> Iterator[Path]:
    """Yield folders of links left by killed processes of this user."""
    import tempfile  # takes 15 ms, which a start that sweeps nothing avoids

    try:
        folder = Path(tempfile.gettempdir())
    except OSError:  # the disk is full
        return
    for path in folder.glob(f"{VIEW}*"):
        with suppress(OSError):
            is_own_folder = path.is_dir() and not path.is_symlink() and path.lstat().st_uid == os.getuid()
            if is_own_folder and _is_old(path) and not _lives(path.name, VIEW):
                yield path


def _drafts_of_exports() -> Iterator[Path]:
    """Yield drafts of exports and uploads that were interrupted and cannot be continued, or not any more."""
    drafts = [*(paths.cache_dir() / "uploads").glob(".*"), *unfinished_drafts()]
    for folder in _listed(paths.runs_dir()):
        for export in read_exports(RunDir(folder)):
            out = output_path(export.request) if export.status.state in ("failed", "canceled") else None
            if out is not None:
                drafts.append(draft_path(out))
    for draft in dict.fromkeys(drafts):
        with suppress(OSError):
            if is_abandoned(draft) and not can_continue(draft):
                yield draft


def leftovers_of(run: RunDir) -> list[Path]:
    """Return all leftovers in one run's folder that :func:`sweep` would delete."""
    left = [path for path in _listed(run.path) if _TEMPORARY.fullmatch(path.name)] + _trainers_drafts(run)
    left = [path for path in left if _is_old(path)]
    return left if left and read_status(run).state not in ACTIVE else []


def _trainers_drafts(run: RunDir) -> list[Path]:
    drafts = [run.adapter_draft] if run.adapter_draft.exists() else []
    for path in (*_listed(run.path), *_listed(run.checkpoints_dir)):
        match = _EARLIER.fullmatch(path.name)
        if path.name.startswith(CHECKPOINT_DRAFT) or (match and path.with_name(match[1]).exists()):
            drafts.append(path)
    # Without its marker it is not a checkpoint: its deletion was interrupted.
    return drafts + [
        path
        for path in _listed(run.checkpoints_dir)
        if re.fullmatch(r"step-\d+", path.name) and not (path / "complete").exists()
    ]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.lstat().st_mtime > OLD_S
    except OSError:
        return False


def _lives(name: str, prefix: str = DRAFT) -> bool:
    """Whether the process is alive whose PID follows ``prefix`` in the name of its draft or view."""
    match = re.match(rf"{re.escape(prefix)}(\d+)-", name)
    return match is not None and Path(f"/proc/{match[1]}").exists()


def delete(path: Path) -> None:
    """Delete a file, or a folder and its contents, as far as possible."""
    if is_abandoned(path):
        with suppress(OSError, UserError):
            delete_abandoned(path)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
