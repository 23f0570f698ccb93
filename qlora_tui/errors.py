"""The exception that users see.

The same object becomes a dialog in the app, lines on stderr, and a ``failed`` event.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXIT_FAILURE = 1
"""Exit code: the call was valid but failed."""
EXIT_USAGE = 2
"""Exit code: the call itself was invalid (a bad argument, an invalid recipe)."""
EXIT_DISK = 74
"""Exit code of a trainer after a disk error (``EX_IOERR`` of sysexits.h). The trainer may be unable to write
an event about such an error.
"""
INTERNAL_ERROR = "Internal error"
"""Title of an exception that indicates a bug in this program."""


_FIELDS = ("title", "what", "why", "fix", "code", "exit_code")


class UserError(Exception):
    """An error that the user can act on."""

    def __init__(
        self,
        title: str,
        *,
        what: str,
        why: str = "",
        fix: str = "",
        code: str = "",
        exit_code: int = EXIT_FAILURE,
    ):
        super().__init__(title)
        self.title = title
        """Title in a few words, such as ``Out of GPU memory``."""
        self.what = what
        """What happened, in one sentence that names the file, key or model."""
        self.why = why
        """Why it happened, in one sentence; empty if unknown."""
        self.fix = fix
        """What to do about it, in one sentence."""
        self.code = code
        """Kind of the error, such as ``preference-pairs``, for code that handles it."""
        self.exit_code = exit_code

    def __str__(self) -> str:
        """Return the full message for stderr: what happened, why, and what to do."""
        parts = [f"{self.title}: {self.what}", self.why, self.fix]
        return "\n  ".join(part for part in parts if part)

    def fields(self) -> dict[str, Any]:
        """Return the arguments that construct an equal error, as strings and a number."""
        return {name: getattr(self, name) for name in _FIELDS}

    @staticmethod
    def of(record: object) -> UserError:
        """Return an error with the fields of ``record``."""
        return UserError(**{name: getattr(record, name) for name in _FIELDS})

    def replace(self, **changes: Any) -> UserError:
        """Return a copy with changed fields, as a plain UserError."""
        return UserError(**self.fields() | changes)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.fields(),))


class UsageError(UserError):
    """An error in the call itself, such as a bad argument or an invalid recipe."""

    def __init__(self, title: str, *, what: str, why: str = "", fix: str = "", code: str = ""):
        super().__init__(title, what=what, why=why, fix=fix, code=code, exit_code=EXIT_USAGE)


def _rebuild(fields: dict[str, Any]) -> UserError:
    return UserError(**fields)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_LONGEST_SHOWN = 300
_USE_ANOTHER_DISK = "point XDG_STATE_HOME, XDG_CACHE_HOME and XDG_CONFIG_HOME at another disk"
_DISK: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("No space left on the disk", "Free some space, or {elsewhere}."),
    errno.EDQUOT: (
        "The disk quota is used up",
        "Delete some of your files, request a larger quota, or {elsewhere}.",
    ),
    errno.EROFS: ("The file system is read-only", "Mount the file system writable, or {elsewhere}."),
    errno.EIO: ("The disk reported an error", "See `dmesg` for details, or {elsewhere}."),
    errno.EACCES: ("Permission denied", "Change its permissions, or {elsewhere}."),
    errno.EPERM: ("Permission denied", "Change its permissions, or {elsewhere}."),
    errno.ENOTDIR: ("A file is where a folder should be", "Move the file away, or {elsewhere}."),
    errno.EEXIST: ("A file is where a folder should be", "Move the file away, or {elsewhere}."),
    errno.EISDIR: ("A folder is where a file should be", "Move the folder away."),
    errno.ENXIO: ("A pipe or a device is where a file should be", "Move it away."),
    errno.EFBIG: ("A file grew past the limit on file sizes", "Lift the limit: `ulimit -f unlimited`."),
    errno.ENAMETOOLONG: (
        "A file name is too long",
        "Use a shorter name: at most 255 bytes per name, and 4,095 per path.",
    ),
    errno.ELOOP: ("Circular symbolic link", "Name the file itself instead of the link."),
    errno.EMFILE: ("Too many open files", "Raise the limit: `ulimit -n 4096`."),
    errno.ENFILE: ("Too many open files", "Close other programs."),
    errno.ESTALE: ("A network folder is gone", "Mount the folder again."),
}
"""Title and remedy by errno. ``{elsewhere}`` is replaced by a way to use another disk."""


def disk_problem(
    error: OSError, path: Path | None = None, *, elsewhere: str = _USE_ANOTHER_DISK
) -> UserError | None:
    """Return a disk error as a UserError; None if the error does not concern the disk.

    ``path`` is named if the error names no file. ``elsewhere`` says how to move the files to another disk.
    """
    if error.errno not in _DISK:
        return None
    title, fix = _DISK[error.errno]
    fix = fix.format(elsewhere=elsewhere)
    where = str(error.filename or path or "Writing a file failed")
    where = where if len(where) <= _LONGEST_SHOWN else f"{where[:_LONGEST_SHOWN]}…"
    why = ""
    if error.errno == errno.EEXIST and Path(where).is_symlink() and not Path(where).exists():
        title, why = "Broken symbolic link", f"The link leads to {os.path.realpath(where)}."
        fix = f"Create that folder, or {elsewhere}."
    if error.errno == errno.ENOSPC and _lacks_inodes(Path(where)):
        why, fix = "The disk has space, but no inodes left: it holds too many files.", "Delete some files."
    what = f"{where}: {error.strerror or os.strerror(error.errno)}."
    return UserError(title, what=what, why=why, fix=fix, code=errno.errorcode[error.errno].lower())


@contextmanager
def disk_problems(title: str = "", path: Path | None = None, fix: str = "") -> Iterator[None]:
    """Convert disk errors inside the block to UserError.

    With a ``title``, every OSError is converted. Its message names ``path``, or the file that the error
    names.
    """
    try:
        yield
    except OSError as error:
        problem = disk_problem(error)
        if title:
            where = path or error.filename or "Writing a file failed"
            what = f"{where}: {error.strerror or error}."
            problem = UserError(title, what=what, fix=fix)
        if problem is None:
            raise
        raise problem from error


def _lacks_inodes(path: Path) -> bool:
    folder = next((parent for parent in (path, *path.parents) if parent.is_dir()), Path("/"))
    try:
        disk = os.statvfs(folder)
    except OSError:
        return False
    return bool(disk.f_files) and not disk.f_favail and bool(disk.f_bavail)
