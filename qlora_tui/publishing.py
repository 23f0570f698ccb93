"""Temporary folders named ``.NAME.part``, the only folders that this program deletes automatically.

The file ``lock`` in such a folder is its marker. It contains a fixed sentence, and the process that uses the
folder keeps it locked, so that only one process at a time writes to a name. ``files`` has the files that the
process writes, and ``earlier`` the files that it replaces. If no process has locked the marker, the process
that used the folder was killed or canceled. A folder without the marker is never touched, whatever its name
is, unless it is empty.

held_draft    a draft of something with a given name: an export, a checkpoint, an adapter
new_draft     a draft with a new name
publish       moves complete files from a draft into place
discard       deletes a folder of this program, by way of a draft, so that a kill leaves no incomplete folder
abandoned_in  drafts that killed processes left in a folder

Drafts of exports are next to the result, wherever the user wants it. They are listed in ``unfinished`` in the
state folder, so that a draft is deleted after a kill even if its name is never used again.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.files import list_folder, read_regular, sync, sync_tree
from qlora_tui.locks import PATIENCE_S, is_locked, locked

_LOCK = "lock"
_MARK = "A temporary folder of qlora-tui, which deletes it once no process of its own has locked this file.\n"
"""Content of the lock file."""
_FILES = "files"
_EARLIER = "earlier"
_NAME = re.compile(r"\.(.+)\.part", re.DOTALL)
_DELETION_S = 0.5
"""Maximum seconds between the deletion of a lock and of its folder."""
_NEW = re.compile(r"\.qlora-tui-[0-9a-f]{12}\.part")


def draft_path(out: Path) -> Path:
    """Return the folder in which ``out`` is prepared."""
    return out.with_name(f".{out.name}.part")


def draft_files(out: Path) -> Path:
    """Return the folder for files in the draft of ``out``."""
    return draft_path(out) / _FILES


def earlier_path(final: Path) -> Path:
    """Return the path at which :func:`publish` keeps the previous ``final`` until the new one is on disk."""
    return draft_path(final) / _EARLIER


def final_path(path: Path) -> Path:
    """Return the final path for a draft or a path inside one; other paths are returned unchanged."""
    for folder in (*reversed(path.parents), path):
        if match := _NAME.fullmatch(folder.name):
            return folder.with_name(match[1])
    return path


@contextmanager
def held_draft(draft: Path, *, is_listed: bool = False) -> Iterator[Path | None]:
    """Create a draft and delete it after the block.

    First, the previous version in the draft of a killed process is moved back into place, and everything else
    in the draft is deleted. The parent folder must exist. With ``is_listed``, :func:`unfinished_drafts` finds
    the draft wherever it is.

    Yields the folder for files, which is empty; None if another process holds the draft. Raises OSError, and
    UserError if the file system has no locks, or a folder without the marker has this name.
    """
    if is_listed:
        # List the draft first, so that no kill leaves an unlisted draft.
        _list(draft)
    with ExitStack() as stack:
        with _without_interruption():
            is_held = _hold(stack, draft)
            if is_held:
                stack.callback(_delete_held, draft)
                if is_listed:
                    # List it again, because a sweep removes drafts from the list that do not exist yet.
                    _list(draft)
        if not is_held:
            yield None
            return
        files = draft / _FILES
        _empty(draft)
        files.mkdir(mode=0o700)
        if files.lstat().st_uid != draft.lstat().st_uid:
            # In a folder that everybody can write to, such as /tmp, its owner could replace the files.
            raise PermissionError(errno.EPERM, "The folder belongs to another user", str(draft))
        yield files


@contextmanager
def new_draft(parent: Path) -> Iterator[Path]:
    """Create a draft with a new name in ``parent``; yield the folder for files. Raises OSError."""
    while True:
        with held_draft(draft_path(parent / f"qlora-tui-{secrets.token_hex(6)}")) as files:
            if files is not None:
                yield files
                return


def publish(files: Path, final: Path) -> None:
    """Move the finished files in the draft of ``final`` into place, durably.

    The previous folder is kept in the draft and deleted with it. If the process is killed before the new
    folder is in place, :func:`restore_earlier` moves the previous folder back. If this raises OSError, the
    previous folder is in place.
    """
    sync_tree(files)
    earlier = earlier_path(final)
    if final.exists():
        final.rename(earlier)
    try:
        files.rename(final)
        sync(final.parent)
    except OSError:
        if not files.exists():
            final.rename(files)
        _put_back(earlier, final)
        raise


def restore_earlier(final: Path) -> bool:
    """Move the previous folder back if nothing has taken its place; return whether it was restored."""
    earlier = kept_earlier(final)
    return earlier is not None and _put_back(earlier, final)


def _put_back(earlier: Path, final: Path) -> bool:
    if not earlier.is_dir() or os.path.lexists(final):
        return False
    earlier.rename(final)
    sync(final.parent)
    return True


def kept_earlier(final: Path) -> Path | None:
    """Return the stored previous version of ``final`` if ``final`` is missing; otherwise None."""
    earlier = earlier_path(final)
    return earlier if earlier.is_dir() and not final.exists() else None


def discard(path: Path) -> None:
    """Delete a folder of this program. Its name is freed in one step. Raises OSError if any of it remains."""
    try:
        with new_draft(path.parent) as files:
            path.rename(files / path.name)
            sync(path.parent)
            shutil.rmtree(files / path.name)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.exists():
            raise
        # A full disk has no room for another folder, and this deletion frees space.
        shutil.rmtree(path)


def abandoned_in(folder: Path) -> list[Path]:
    """Return this user's drafts in a folder, except those that a process holds."""
    return [
        path
        for path in list_folder(folder)
        # In a folder that everybody can write to, such as /tmp, skip drafts of other users.
        if _NAME.fullmatch(path.name) and is_abandoned(path) and path.lstat().st_uid == os.getuid()
    ]


def unfinished_drafts() -> Iterator[Path]:
    """Yield every listed draft that a killed process left behind; unlist drafts that no longer exist."""
    for entry in _listing().glob("*"):
        with suppress(OSError, ValueError):
            draft = Path(os.fsdecode(read_regular(entry)))
            # An empty folder has no marker (yet or anymore), but the list shows whose it is.
            if is_abandoned(draft) or (is_ours(draft) and not any(draft.iterdir())):
                yield draft
            elif not draft.exists():
                entry.unlink()


def delete_unfinished() -> None:
    """Delete every listed draft that a killed process left behind, as far as possible."""
    for draft in unfinished_drafts():
        with suppress(OSError, UserError), held_draft(draft):
            pass


def _listing() -> Path:
    return paths.state_dir() / "unfinished"


def _list(draft: Path) -> None:
    """Add a draft to the list. If this fails, the draft may stay after a kill."""
    with suppress(OSError):
        _entry(draft).parent.mkdir(mode=0o700, exist_ok=True)
        _entry(draft).write_bytes(os.fsencode(draft.absolute()))


def _entry(draft: Path) -> Path:
    import hashlib  # imports OpenSSL, which a start without exports avoids

    name = os.fsencode(draft.absolute())
    return _listing() / hashlib.sha256(name).hexdigest()[:16]


def is_ours(draft: Path) -> bool:
    """Return whether a folder with a draft's name has this program's marker, or is still empty."""
    try:
        if not _NAME.fullmatch(draft.name) or not stat.S_ISDIR(draft.lstat().st_mode):
            return False
        lock = draft / _LOCK
        names = [path.name for path in draft.iterdir()]
        if not names:
            return True
        if _LOCK in names and not os.path.lexists(lock):
            # The holder is just deleting it. The lock is deleted last.
            return is_ours(draft)
        if not stat.S_ISREG(lock.lstat().st_mode):
            return False
        content = read_regular(lock, len(_MARK) + 1)
        return content == _MARK.encode() or (names == [_LOCK] and not content)
    except OSError:
        return False


def is_abandoned(draft: Path) -> bool:
    """Return whether this is an existing draft of this program that no process holds."""
    # Without a lock the folder is empty, and only its name can show whose it is.
    is_marked = (draft / _LOCK).exists() or _NEW.fullmatch(draft.name) is not None
    return is_marked and is_ours(draft) and is_locked(draft / _LOCK) is False


def delete_abandoned(draft: Path) -> None:
    """Delete a draft unless a process holds it. Does nothing if there is none. Raises OSError."""
    if is_abandoned(draft):
        with held_draft(draft):
            pass


def _hold(stack: ExitStack, draft: Path) -> bool:
    """Create a draft if it does not exist, and lock it until ``stack`` is closed.

    Returns False if another process has locked it.
    """
    deadline = time.monotonic() + _DELETION_S
    while True:
        # exist_ok would fail if the folder is deleted at the same time.
        with suppress(FileExistsError):
            draft.mkdir(mode=0o700)
        if not is_ours(draft):
            if not os.path.lexists(draft) or time.monotonic() < deadline:
                # The holder is just deleting it. After the lock is deleted, nothing shows whose the folder
                # is.
                time.sleep(0.01)
                continue
            raise UserError(
                "A folder of another program is in the way",
                what=f"{draft} exists, but nothing in it shows that qlora-tui made it.",
                why="qlora-tui replaces or deletes only folders that it created.",
                fix="Move the folder away, or delete it if you know that you do not need it.",
            )
        try:
            with ExitStack() as attempt:
                lock = attempt.enter_context(locked(draft / _LOCK, patience_s=PATIENCE_S))
                if lock is None:
                    return False
                # The holder may have deleted this lock, and a third process may have created another.
                if os.path.samestat(os.fstat(lock.fileno()), (draft / _LOCK).stat()):
                    if not os.fstat(lock.fileno()).st_size:
                        _mark(draft / _LOCK, lock)
                    stack.enter_context(attempt.pop_all())
                    return True
        except FileNotFoundError:
            # The holder has just deleted the folder.
            continue
        except OSError:
            # If there was no room for the lock, the folder is empty.
            with suppress(OSError):
                draft.rmdir()
            raise
        except UserError:
            # If the file system has no locks, no process marks the folder.
            with suppress(OSError):
                if not (draft / _LOCK).stat().st_size:
                    (draft / _LOCK).unlink()
                    draft.rmdir()
            raise


def _mark(path: Path, lock: IO[str]) -> None:
    """Write the marker. If this raises OSError, the lock is deleted."""
    try:
        lock.write(_MARK)
        lock.flush()
        # The marker must be on disk before any file; otherwise a power cut would leave a folder that nobody
        # owns.
        os.fsync(lock.fileno())
    except OSError:
        path.unlink()
        raise


def _delete_held(draft: Path) -> None:
    """Delete a draft as far as possible. The lock is deleted last, and stays if any other file remains."""
    with _without_interruption(), suppress(OSError):
        _empty(draft)
        if [path.name for path in draft.iterdir()] != [_LOCK]:
            # The lock marks the rest for the next sweep.
            return
        (draft / _LOCK).unlink()
        draft.rmdir()
        if os.path.lexists(_listing()):
            _entry(draft).unlink()


@contextmanager
def _without_interruption() -> Iterator[None]:
    """Delay Ctrl+C and SIGTERM until after the block.

    A signal mask would not work: another thread would take the signal, and Python would raise it in this
    thread.
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
    """Delete everything except the lock, as far as possible, after moving the previous folder back."""
    match = _NAME.fullmatch(draft.name)
    assert match is not None
    # Do not restore from the location of version 1.0, because in a user's folder it may not be this
    # program's.
    _put_back(draft / _EARLIER, draft.with_name(match[1]))
    for path in draft.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _LOCK:
            with suppress(OSError):
                path.unlink()
