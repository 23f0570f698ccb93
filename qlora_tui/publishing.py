"""Temporary folders, the only ones that this program deletes on its own: ``.NAME.part``, with a marker.

``lock`` in such a folder is its marker, a sentence of ours. The process that uses the folder holds a lock on
it, which also makes one process at a time write to a name. ``files`` holds what the process writes, and
``earlier`` what it replaces. A marked folder whose lock is free belongs to a process that was killed or
canceled. A folder without the marker is somebody else's, whatever its name is, and is never touched.

held_draft    a folder for what gets a certain name: an export, a checkpoint, an adapter
new_draft     one with a name of its own
publish       moves what is complete out of it, into place
discard       deletes something of ours: into such a folder first, so that a kill leaves no half of it
abandoned_in  what killed processes left in a folder

Drafts of exports are wherever the user wants the result: they are listed in the folder ``unfinished`` of the
state, so that what a kill leaves is deleted even if nothing is ever written to that name again.
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
"""Content of the lock."""
_FILES = "files"
_EARLIER = "earlier"
_NAME = re.compile(r"\.(.+)\.part", re.DOTALL)
_DELETION_S = 0.5
"""Most seconds between the deletion of a lock and that of its folder."""
_NEW = re.compile(r"\.qlora-tui-[0-9a-f]{12}\.part")


def draft_path(out: Path) -> Path:
    """Return the folder in which ``out`` is prepared."""
    return out.with_name(f".{out.name}.part")


def draft_files(out: Path) -> Path:
    """Return the folder for files in the draft of ``out``."""
    return draft_path(out) / _FILES


def earlier_path(final: Path) -> Path:
    """Return where :func:`publish` keeps the previous ``final`` until the next one is on the disk."""
    return draft_path(final) / _EARLIER


def final_path(path: Path) -> Path:
    """Return what is prepared if ``path`` is a draft or in one; other paths as they are."""
    for folder in (*reversed(path.parents), path):
        if match := _NAME.fullmatch(folder.name):
            return folder.with_name(match[1])
    return path


@contextmanager
def held_draft(draft: Path, *, is_listed: bool = False) -> Iterator[Path | None]:
    """Create a draft, in a folder that exists, and delete it afterwards, or what a killed process left in it.

    With ``is_listed``, :func:`unfinished_drafts` finds it wherever it is.

    Yields the folder for files, otherwise empty; None if another process holds the draft.
    Raises OSError, and UserError if the file system has no locks or a folder without our marker has the name.
    """
    if is_listed:
        # First, so that no kill leaves one that is not listed.
        _list(draft)
    with ExitStack() as stack:
        with _without_interruption():
            is_held = _hold(stack, draft)
            if is_held:
                stack.callback(_delete_held, draft)
                if is_listed:
                    # Again, because a sweep takes one that is not there yet off the list.
                    _list(draft)
        if not is_held:
            yield None
            return
        files = draft / _FILES
        _empty(draft)
        files.mkdir(mode=0o700)
        if files.lstat().st_uid != draft.lstat().st_uid:
            # Where everybody may write, as in /tmp, its owner could replace the files.
            raise PermissionError(errno.EPERM, "The folder belongs to another user", str(draft))
        yield files


@contextmanager
def new_draft(parent: Path) -> Iterator[Path]:
    """Create a draft in ``parent`` under a new name; yields the folder for files. Raises OSError."""
    while True:
        with held_draft(draft_path(parent / f"qlora-tui-{secrets.token_hex(6)}")) as files:
            if files is not None:
                yield files
                return


def publish(files: Path, final: Path) -> None:
    """Move the finished files of the draft of ``final`` into place, durably.

    What they replace is deleted with the draft; a crash in between leaves it where :func:`restore_earlier`
    finds it. Raises OSError; the previous folder is then still in place.
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
    """Put the previous folder back if nothing is in its place; return whether it was restored."""
    earlier = kept_earlier(final)
    return earlier is not None and _put_back(earlier, final)


def _put_back(earlier: Path, final: Path) -> bool:
    if not earlier.is_dir() or os.path.lexists(final):
        return False
    earlier.rename(final)
    sync(final.parent)
    return True


def kept_earlier(final: Path) -> Path | None:
    """Return the kept previous version of ``final`` if ``final`` is missing, else None."""
    # Version 1.0 used the second place.
    places = (earlier_path(final), final.with_name(f".{final.name}.earlier"))
    return None if final.exists() else next((place for place in places if place.is_dir()), None)


def discard(path: Path) -> None:
    """Delete a folder of ours; it leaves its name in one step. Raises OSError if any of it is left."""
    try:
        with new_draft(path.parent) as files:
            path.rename(files / path.name)
            sync(path.parent)
            shutil.rmtree(files / path.name)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.exists():
            raise
        # A full disk has no room for another folder, and this is what makes some.
        shutil.rmtree(path)


def abandoned_in(folder: Path) -> list[Path]:
    """Return the drafts in a folder that no process holds."""
    return [
        path
        for path in list_folder(folder)
        # In a folder of everybody, such as /tmp, those of other users are theirs.
        if _NAME.fullmatch(path.name) and is_abandoned(path) and path.lstat().st_uid == os.getuid()
    ]


def unfinished_drafts() -> Iterator[Path]:
    """Yield every listed draft that a killed process left."""
    for entry in _listing().glob("*"):
        with suppress(OSError, ValueError):
            draft = Path(os.fsdecode(read_regular(entry)))
            # An empty folder has no marker yet, or no longer: the list shows whose it is.
            if is_abandoned(draft) or (is_ours(draft) and not any(draft.iterdir())):
                yield draft
            elif not draft.exists():
                entry.unlink()


def delete_unfinished() -> None:
    """Delete every listed draft that a killed process left, as far as possible."""
    for draft in unfinished_drafts():
        with suppress(OSError, UserError), held_draft(draft):
            pass


def _listing() -> Path:
    return paths.state_dir() / "unfinished"


def _list(draft: Path) -> None:
    """Add a draft to the list; if the state cannot be written, it is not deleted later."""
    with suppress(OSError):
        _entry(draft).parent.mkdir(mode=0o700, exist_ok=True)
        _entry(draft).write_bytes(os.fsencode(draft.absolute()))


def _entry(draft: Path) -> Path:
    import hashlib  # imports OpenSSL, which a start that exports nothing avoids

    name = os.fsencode(draft.absolute())
    return _listing() / hashlib.sha256(name).hexdigest()[:16]


def is_ours(draft: Path) -> bool:
    """Return whether a folder of a draft's name has our marker, or has nothing in it yet."""
    try:
        if not _NAME.fullmatch(draft.name) or not stat.S_ISDIR(draft.lstat().st_mode):
            return False
        lock = draft / _LOCK
        names = [path.name for path in draft.iterdir()]
        if not names:
            return True
        if _LOCK in names and not os.path.lexists(lock):
            # Its holder deletes it just now: the lock goes last.
            return is_ours(draft)
        if not stat.S_ISREG(lock.lstat().st_mode):
            return False
        content = read_regular(lock, len(_MARK) + 1)
        return content == _MARK.encode() or (names == [_LOCK] and not content)
    except OSError:
        return False


def is_abandoned(draft: Path) -> bool:
    """Return whether this is a draft of ours that exists and that no process holds."""
    # Without a lock it is empty: nothing shows whose it is, unless its name does.
    is_marked = (draft / _LOCK).exists() or _NEW.fullmatch(draft.name) is not None
    return is_marked and is_ours(draft) and is_locked(draft / _LOCK) is False


def delete_abandoned(draft: Path) -> None:
    """Delete a draft unless a process holds it; does nothing if there is none. Raises OSError."""
    if is_abandoned(draft):
        with held_draft(draft):
            pass


def _hold(stack: ExitStack, draft: Path) -> bool:
    """Lock a draft until ``stack`` is closed; False if another process has locked it."""
    deadline = time.monotonic() + _DELETION_S
    while True:
        # Not exist_ok, which fails where the folder is deleted meanwhile.
        with suppress(FileExistsError):
            draft.mkdir(mode=0o700)
        if not is_ours(draft):
            if not os.path.lexists(draft) or time.monotonic() < deadline:
                # Its holder deletes it just now: between lock and folder nothing shows whose it is.
                time.sleep(0.01)
                continue
            raise UserError(
                "A folder of another program is in the way",
                what=f"{draft} exists, but nothing in it shows that qlora-tui made it.",
                why="qlora-tui replaces or deletes only folders that it can prove to have made.",
                fix="Move it away, or delete it if you know that you do not need it.",
            )
        try:
            with ExitStack() as attempt:
                lock = attempt.enter_context(locked(draft / _LOCK, patience_s=PATIENCE_S))
                if lock is None:
                    return False
                # Its holder may have deleted this lock, and a third process created another.
                if os.path.samestat(os.fstat(lock.fileno()), (draft / _LOCK).stat()):
                    if not os.fstat(lock.fileno()).st_size:
                        _mark(draft / _LOCK, lock)
                    stack.enter_context(attempt.pop_all())
                    return True
        except FileNotFoundError:
            # Its holder has deleted the folder just now.
            continue
        except OSError:
            # Where there was no room for the lock, nothing is in it.
            with suppress(OSError):
                draft.rmdir()
            raise
        except UserError:
            # Without locks nobody marks it.
            with suppress(OSError):
                if not (draft / _LOCK).stat().st_size:
                    (draft / _LOCK).unlink()
                    draft.rmdir()
            raise


def _mark(path: Path, lock: IO[str]) -> None:
    """Write the marker. Raises OSError, and deletes the lock then."""
    try:
        lock.write(_MARK)
        lock.flush()
        # On the disk before any file, or a power cut would leave a folder that is nobody's.
        os.fsync(lock.fileno())
    except OSError:
        path.unlink()
        raise


def _delete_held(draft: Path) -> None:
    """Delete a draft as far as possible: the lock last, and nothing that another process adds after that."""
    with _without_interruption(), suppress(OSError):
        _empty(draft)
        if [path.name for path in draft.iterdir()] != [_LOCK]:
            # The lock marks what could not be deleted, for the next sweep.
            return
        (draft / _LOCK).unlink()
        draft.rmdir()
        if os.path.lexists(_listing()):
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
    """Delete everything but the lock, as far as possible; what was to be replaced is put back first."""
    match = _NAME.fullmatch(draft.name)
    assert match is not None
    # Not from the place of version 1.0, which in a folder of the user's is not ours.
    _put_back(draft / _EARLIER, draft.with_name(match[1]))
    for path in draft.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _LOCK:
            with suppress(OSError):
                path.unlink()
