"""Hidden folders for what an export has not finished: ``.NAME.part`` beside the name it will have.

``lock`` in it is held by the process that writes, which makes one export to a name at a time; ``files`` is
what it writes. A draft whose lock is free belongs to a process that was killed or canceled.

An export that can continue names a key: a hash of all that its files depend on, which is in ``key``. A draft
with one outlives a cancel and a kill, and the next export to that name with the same key gets its files. It
is listed in the folder ``unfinished`` of the state, so that it is deleted even if it is never continued.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qlora_tui import paths
from qlora_tui.runs.locks import PATIENCE_S, is_locked, locked

KEPT_S = 7 * 24 * 3600.0
"""Time for which a draft can be continued after its export was interrupted, in seconds."""
_LOCK = "lock"
_FILES = "files"
_KEY = "key"
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
def held_draft(draft: Path, key: str = "") -> Iterator[Path | None]:
    """Create a draft, in a folder that exists, and delete it afterwards, or what a killed process left in it.

    With ``key``, the files of an interrupted export with the same key are still there, and Ctrl+C and SIGTERM
    leave them for the next.

    Yields the folder for files, otherwise empty; None if another process holds the draft.
    Raises OSError, and UserError if the file system has no locks.
    """
    with ExitStack() as stack:
        deletion = ExitStack()
        with _without_interruption():
            is_held = _hold(stack, draft)
            if is_held:
                stack.enter_context(deletion)
                deletion.callback(_delete_held, draft)
        if not is_held:
            yield None
            return
        files = draft / _FILES
        if not key or _key_of(draft) != key or not files.is_dir():
            _empty(draft)
            files.mkdir(mode=0o700)
        if files.lstat().st_uid != draft.lstat().st_uid:
            # Where everybody may write, as in /tmp, its owner could replace the files.
            raise PermissionError(errno.EPERM, "The folder belongs to another user", str(draft))
        if key:
            _list(draft)
            (draft / _KEY).write_text(key)
        try:
            yield files
        except Exception:
            raise
        except BaseException:
            if _key_of(draft):
                deletion.pop_all()
            raise


def forget_key(path: Path) -> None:
    """Let nothing continue the export whose draft ``path`` is in: it is complete."""
    draft = next((folder for folder in path.parents if _NAME.fullmatch(folder.name)), None)
    if draft is not None:
        (draft / _KEY).unlink(missing_ok=True)


def can_continue(draft: Path) -> bool:
    """Return whether the next export to this name continues an interrupted one."""
    try:
        age = time.time() - (draft / _KEY).stat().st_mtime
    except OSError:
        return False
    return age < KEPT_S and is_abandoned(draft)


def unfinished_drafts() -> Iterator[Path]:
    """Yield every draft with a key whose export was interrupted."""
    for entry in _listing().glob("*"):
        with suppress(OSError, ValueError):
            draft = Path(entry.read_text())
            if is_abandoned(draft):
                yield draft
            elif not draft.exists():
                entry.unlink()


def _listing() -> Path:
    return paths.state_dir() / "unfinished"


def _list(draft: Path) -> None:
    """Add a draft to the list; if the state cannot be written, it is not deleted later."""
    with suppress(OSError):
        _entry(draft).parent.mkdir(mode=0o700, exist_ok=True)
        _entry(draft).write_text(str(draft.absolute()))


def _entry(draft: Path) -> Path:
    return _listing() / hashlib.sha256(str(draft.absolute()).encode()).hexdigest()[:16]


def _key_of(draft: Path) -> str:
    try:
        return (draft / _KEY).read_text()
    except (OSError, ValueError):
        return ""


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
        _entry(draft).unlink()


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
