"""Hidden folders for what an export has not finished: ``.NAME.part`` beside the name it will have.

``lock`` in it is held by the process that writes, which makes one export to a name at a time; ``files`` is
what it writes. A draft whose lock nobody holds belongs to a process that was killed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qlora_tui.runs.locks import PATIENCE_S, is_locked, locked

_LOCK = "lock"
_FILES = "files"
_NAME = re.compile(r"\.(.+)\.part")


def draft_path(out: Path) -> Path:
    """Return the folder in which ``out`` is prepared."""
    return out.with_name(f".{out.name}.part")


def final_path(path: Path) -> Path:
    """Return what is prepared where ``path`` is a draft or in one; other paths as they are."""
    for folder in (*reversed(path.parents), path):
        if match := _NAME.fullmatch(folder.name):
            return folder.with_name(match[1])
    return path


@contextmanager
def held_draft(draft: Path) -> Iterator[Path | None]:
    """Create a draft, in a folder that exists, and delete it afterwards, or what a killed process left in it.

    Yields the empty folder for files; None if another process holds the draft.
    Raises OSError, and UserError if the file system has no locks.
    """
    with ExitStack() as stack:
        with _without_interruption():
            is_held = _hold(stack, draft)
            if is_held:
                stack.callback(_delete_held, draft)
        if not is_held:
            yield None
            return
        _empty(draft)
        files = draft / _FILES
        files.mkdir(mode=0o700)
        if files.lstat().st_uid != draft.lstat().st_uid:
            # Where everybody may write, as in /tmp, its owner could replace the files.
            raise PermissionError(errno.EPERM, "The folder belongs to another user", str(draft))
        yield files


def is_abandoned(draft: Path) -> bool:
    """Whether this is a draft that exists and that no process holds."""
    return bool(_NAME.fullmatch(draft.name)) and draft.is_dir() and is_locked(draft / _LOCK) is False


def delete_abandoned(draft: Path) -> None:
    """Delete a draft unless a process holds it; does nothing where there is none. Raises OSError."""
    if is_abandoned(draft):
        with held_draft(draft):
            pass


def _hold(stack: ExitStack, draft: Path) -> bool:
    """Lock a draft until ``stack`` is closed; False if another process has locked it."""
    while True:
        # Not exist_ok, which fails where the folder is deleted meanwhile.
        with suppress(FileExistsError):
            draft.mkdir(mode=0o700)
        with ExitStack() as attempt:
            try:
                lock = attempt.enter_context(locked(draft / _LOCK, patience_s=PATIENCE_S))
            except FileNotFoundError:
                # Its holder has deleted the folder just now.
                continue
            if lock is None:
                return False
            with suppress(FileNotFoundError):
                # Its holder may have deleted this lock, and a third process created another.
                if os.path.samestat(os.fstat(lock.fileno()), (draft / _LOCK).stat()):
                    stack.enter_context(attempt.pop_all())
                    return True


def _delete_held(draft: Path) -> None:
    """Delete a draft as far as possible: the lock last, and nothing that another process adds after that."""
    with _without_interruption(), suppress(OSError):
        _empty(draft)
        (draft / _LOCK).unlink()
        draft.rmdir()


@contextmanager
def _without_interruption() -> Iterator[None]:
    """Deliver Ctrl+C and SIGTERM after the block.

    Not by a signal mask: another thread would take the signal, and Python raise it in this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: arrived.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        for arrived_number in dict.fromkeys(arrived):
            signal.raise_signal(arrived_number)


def _empty(draft: Path) -> None:
    """Delete everything but the lock, as far as possible."""
    for path in draft.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _LOCK:
            with suppress(OSError):
                path.unlink()
