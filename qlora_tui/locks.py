"""File locks, which the kernel releases however their holder ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qlora_tui.errors import UserError

PATIENCE_S = 0.5
"""Seconds to retry, because :func:`is_locked` in another process may hold the lock for a moment."""
_RETRY_S = 0.05


@contextmanager
def locked(path: Path, *, patience_s: float = 0.0) -> Iterator[IO[str] | None]:
    """Hold an exclusive lock on a file for the duration of the block; yield None if another process holds it.

    The file is created if needed. ``patience_s``: how long to keep retrying, in seconds. Raises UserError if
    the file system has no locks, and OSError if the file cannot be opened.
    """
    deadline = time.monotonic() + patience_s
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    yield None
                    return
                time.sleep(_RETRY_S)
            except OSError as error:
                raise no_locks(path, error) from error
        yield file


def hold_folder(folder: Path) -> int | None:
    """Mark a folder as used by this process until the returned descriptor is closed. Return None if it cannot
    be marked.

    Any number of processes may use a folder at the same time.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def is_held(folder: Path) -> bool:
    """Return whether a process has marked a folder as used; False also if the file system has no locks."""
    return bool(_is_refused(folder, fcntl.LOCK_EX))


def is_locked(path: Path) -> bool | None:
    """Return whether a process on any machine holds the lock; None if unknown."""
    return _is_refused(path, fcntl.LOCK_SH)


def _is_refused(path: Path, kind: int) -> bool | None:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(file)
    return False


def no_locks(path: Path, error: OSError) -> UserError:
    """Return the error for a file system without locks."""
    return UserError(
        "File locks do not work",
        what=f"{path} could not be locked: {error.strerror or error}.",
        why="Without locks two processes could write the same files.",
        fix="Use a local disk (for runs, set XDG_STATE_HOME); a network folder needs its lock service.",
    )
