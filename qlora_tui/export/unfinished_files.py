"""Files that appear under their name only when they are complete, and never replace another."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.files import private_dir, sync, sync_tree
from qlora_tui.runs.locks import is_locked, locked

_LOCK = "lock"
"""File beside a draft folder that is locked as long as its export is running."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def refuse_existing(out: Path) -> None:
    """Raise UserError where there is anything under a name."""
    if out.exists() or out.is_symlink():
        raise UserError(
            "The file exists already",
            what=f"{out} exists already.",
            why="Existing files are never overwritten.",
            fix="Choose another name, or remove that file.",
            exit_code=EXIT_USAGE,
        )


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise UserError where fewer than ``needed`` bytes are free; ``what`` begins the sentence."""
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            "Not enough disk space",
            what=f"{what} takes {needed / 1e9:.1f} GB, and {parent} has {free / 1e9:.1f} GB left.",
            fix="Free some space, or write to another disk.",
        )


@contextmanager
def draft_folder(out: Path) -> Iterator[Path]:
    """Make a hidden folder beside ``out`` for unfinished files, and delete it afterwards.

    Deletes those of exports that were killed. Raises UserError for any OSError inside.
    """
    with ExitStack() as stack:
        try:
            private_dir(out.parent)
            _delete_abandoned(out)
            hidden = Path(tempfile.mkdtemp(prefix=f"{_prefix(out)}-", dir=out.parent))
            stack.callback(shutil.rmtree, hidden, ignore_errors=True)
            stack.enter_context(locked(hidden / _LOCK))
            draft = hidden / "files"
            draft.mkdir(mode=0o700)
            yield draft
        except OSError as error:
            raise UserError(
                "The export could not be written",
                what=f"{out}: {error.strerror or error}.",
                fix="Free some space, or write to another folder.",
            ) from error


def _delete_abandoned(out: Path) -> None:
    for folder in out.parent.glob(f"{glob.escape(_prefix(out))}-*"):
        if is_locked(folder / _LOCK) is False:
            shutil.rmtree(folder, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".{out.name}.part"


def publish_new(draft: Path, final: Path) -> None:
    """Give a finished folder its name, durably; never in place of another folder or file.

    Raises UserError and OSError.
    """
    sync_tree(draft)
    refuse_existing(final)
    # Onto a folder with files that appeared just now, it fails.
    draft.rename(final)
    sync(final.parent)


def publish_file(draft: Path, final: Path) -> None:
    """Give a finished file its name, durably. Raises FileExistsError for a file that appeared meanwhile."""
    private_dir(final.parent)
    draft.chmod(0o644)
    sync(draft)
    try:
        # Unlike a rename, a link never replaces a file.
        os.link(draft, final)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        refuse_existing(final)
        draft.rename(final)
    sync(final.parent)
