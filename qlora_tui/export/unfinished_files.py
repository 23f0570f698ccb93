"""Files that appear under their names only when they are complete, and never replace other files."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_tui.errors import EXIT_USAGE, UserError, disk_problem
from qlora_tui.files import private_dir, sync, sync_tree
from qlora_tui.formatting import format_bytes
from qlora_tui.publishing import draft_path, final_path, held_draft

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refuse_existing(out: Path) -> None:
    """Raise UserError if anything exists under this name."""
    if out.exists() or out.is_symlink():
        raise UserError(
            "The file already exists",
            what=f"{out} already exists.",
            why="Existing files are never overwritten.",
            fix="Choose another name, or remove that file.",
            exit_code=EXIT_USAGE,
        )


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise UserError if the disk of ``folder`` has fewer than ``needed`` bytes free. ``what`` is the subject
    of the error's sentence.
    """
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    usage = shutil.disk_usage(parent)
    free = usage.free
    # A file system such as /proc has no size. Writing there fails with a reason.
    if usage.total and needed > free:
        raise UserError(
            "Not enough disk space",
            what=f"{what} takes {format_bytes(needed)}, but {parent} has {format_bytes(free)} left.",
            fix="Free some space, or write to another disk.",
        )


@contextmanager
def draft_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden, empty folder next to ``out`` for unfinished files, and delete it afterwards.

    The draft of a killed export is deleted first. Raises UserError if another export is writing
    ``out``. An OSError inside the block becomes a UserError.
    """
    with export_problems(out):
        private_dir(out.parent)
        with held_draft(draft_path(out), is_listed=True) as draft:
            if draft is None:
                raise UserError(
                    "Another export writes there",
                    what=f"{out} is being written by another export.",
                    fix="Wait until that export has ended, cancel it, or choose another name.",
                )
            yield draft


@contextmanager
def export_problems(out: Path | None = None) -> Iterator[None]:
    """Convert OSErrors inside the block to UserErrors. They are about ``out`` if the OSError names no file
    or the disk is full.
    """
    try:
        yield
    except OSError as error:
        named = Path(error.filename or out or "A file")
        if out is not None and error.errno in _FULL:
            # If a copy fails for lack of space, the error names the file that is read.
            named = out
        where = final_path(named)
        if where != named and error.errno in _UNWRITABLE:
            where = where.parent
        error.filename = str(where)
        problem = disk_problem(error, elsewhere="write to another folder")
        raise problem or UserError(
            "The export could not be written",
            what=f"{where}: {error.strerror or error}.",
            fix="Check that the file can be written, then export again.",
        ) from error


def publish_new(draft: Path, final: Path) -> None:
    """Give a finished folder its name, durably and without replacing anything.

    Raises UserError and OSError.
    """
    sync_tree(draft)
    refuse_existing(final)
    try:
        # This fails for a folder with files that has just appeared there.
        draft.rename(final)
    except OSError:
        refuse_existing(final)
        raise
    sync(final.parent)


def publish_files(finals: Mapping[Path, Path]) -> None:
    """Give each finished file (key) its name (value), all of them or none. Raises UserError and OSError."""
    published: list[Path] = []
    try:
        for draft, final in finals.items():
            publish_file(draft, final)
            published.append(final)
    except BaseException:
        for draft, final in finals.items():
            # Remove only what was published here, because another program may have written a file of this
            # name.
            with suppress(OSError):
                if final in published or final.samefile(draft):
                    final.unlink()
        raise


def publish_file(draft: Path, final: Path) -> None:
    """Give a finished file its name, durably and without replacing anything. Raises UserError and OSError."""
    private_dir(final.parent)
    draft.chmod(0o644)
    sync(draft)
    try:
        # Unlike a rename, a link never replaces a file.
        os.link(draft, final)
    except OSError as error:
        refuse_existing(final)
        if error.errno not in _NO_LINKS:
            raise
        draft.rename(final)
    sync(final.parent)
