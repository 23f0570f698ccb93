"""Crash-safe files: after a kill or a power cut a file has its old content or the new, never a mix.

atomic_write     replaces one file
sync             flushes what was written so far to disk
open_regular     opens a file, and refuses a pipe instead of waiting for it
write_new        writes a file that the user named; never replaces an existing file
open_foreign     opens a regular file of another program
walk_files       lists a folder of the user, including linked subfolders

A rename alone is not enough: a file's content and a folder's list of names reach the disk only when
synced. Otherwise a power cut can leave empty files on ext4 and XFS, and no files on btrfs.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import stat
from io import BufferedReader, BufferedWriter
from itertools import takewhile
from pathlib import Path

from qlora_tui.errors import EXIT_USAGE, UserError

TEMPORARY = re.compile(r"\.qlora-tui-\w{8}\.tmp")
"""Names of temporary files of :func:`atomic_write`."""
_MIB = 1 << 20


def private_dir(path: Path) -> Path:
    """Create ``path`` and its parents, accessible only by the owner, and return it."""
    if path.exists():
        return path
    missing = list(takewhile(lambda folder: not folder.exists(), (path, *path.parents)))
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    return path


def atomic_write(
    path: Path, content: bytes | str, *, durable: bool = False, keep: Path | None = None
) -> None:
    """Replace ``path`` in one step.

    With ``durable``, content and name are on disk on return, so a power cut neither empties the file nor
    restores the previous one. The previous file is saved as ``keep``, if given, and synced before the
    replacement. Raises OSError. The previous file is then unchanged, unless only the sync after the
    replacement failed.
    """
    import tempfile  # takes 15 ms, which a start without writing avoids

    data = content.encode() if isinstance(content, str) else content
    # The file's own name is not included, because it may already have the maximum length.
    handle, name = tempfile.mkstemp(prefix=".qlora-tui-", suffix=".tmp", dir=path.parent)
    try:
        try:
            write_all(handle, data)
            if durable:
                os.fsync(handle)
        finally:
            os.close(handle)
        if keep is not None:
            _keep(path, keep)
        os.replace(name, path)  # noqa: PTH105 (one call to os for tests to watch)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def _keep(path: Path, keep: Path) -> None:
    """Give a file a second name, durably; copy the file if the file system has no hard links."""
    try:
        os.link(path, keep)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        shutil.copyfile(path, keep)
        sync(keep)
    sync(keep.parent)


def write_all(handle: int, data: bytes) -> None:
    """Write all bytes, which may take several calls on a nearly full disk. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file. Pipes, devices and files in ``/proc`` are rejected, because reading them may
    block.

    Raises OSError, with EISDIR for a folder and ENXIO for the others.
    """
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENXIO
        raise OSError(code, os.strerror(code), str(path))
    if _is_made_up(handle, flags):
        os.close(handle)
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), str(path))
    return handle


def _is_made_up(handle: int, flags: int) -> bool:
    """Return whether the kernel generates a file's content, as in ``/proc``. Such a file has content although
    its size is 0. Always false for a file that is opened for writing.
    """
    if flags & os.O_ACCMODE != os.O_RDONLY or os.fstat(handle).st_size:
        return False
    try:
        return bool(os.pread(handle, 1, 0)) and not os.fstat(handle).st_size
    except OSError:
        return True


def read_regular(path: Path, max_bytes: int = 1 << 24) -> bytes:
    """Return up to ``max_bytes`` from the start of a file. Raises OSError, like :func:`open_regular`."""
    with open_to_read(path) as file:
        return file.read(max_bytes)


def open_to_read(path: Path) -> BufferedReader:
    """Open a file for reading. Raises OSError, like :func:`open_regular`."""
    return os.fdopen(open_regular(path), "rb")


def open_append(path: Path) -> BufferedWriter:
    """Open a file for appending, creating it if needed. Raises OSError, like :func:`open_regular`."""
    return os.fdopen(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")


def sync(path: Path) -> None:
    """Wait until the content of a file, or the list of names in a folder, is on disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync folders, and there is no alternative.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def list_folder(folder: Path) -> list[Path]:
    """Return the entries of a folder, sorted by name; empty if it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def size_of(path: Path) -> int:
    """Return the size of a file, or of all files in a folder, in bytes. Raises OSError."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def sync_tree(folder: Path) -> None:
    """Sync every file and folder inside ``folder``, then ``folder`` itself."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            sync_tree(entry)
        elif entry.is_file():
            sync(entry)
    sync(folder)


def open_foreign(path: Path) -> io.BufferedReader:
    """Open a regular file, or a link to one, for reading. Raises OSError for anything else; never blocks."""
    try:
        return open_to_read(path)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ENXIO):
            raise
        raise OSError(errno.EINVAL, "it is not a regular file", str(path)) from None


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read a regular file. Raises OSError if it is not regular or exceeds ``max_bytes``."""
    with open_foreign(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes // _MIB} MiB", str(path))
    return content


def write_new(file: Path, content: bytes) -> None:
    """Write a new file. Raises UserError if the file exists or cannot be written."""
    try:
        with file.open("xb") as created:
            created.write(content)
    except FileExistsError as error:
        raise UserError(
            "The file was not saved",
            what=f"{file} exists.",
            fix="Choose another name, or delete the existing file.",
            exit_code=EXIT_USAGE,
        ) from error
    except OSError as error:
        raise UserError(
            "The file was not saved",
            what=f"{file} cannot be written: {error.strerror}.",
            fix="Choose another folder.",
        ) from error


def walk_files(folder: Path) -> list[Path]:
    """Return all files in a folder and its subfolders, as sorted relative paths.

    A subfolder that several links lead to is searched only once. Hidden subfolders, and links to this folder
    or its parents, are in the result, but not the files in them. Raises OSError for a subfolder that cannot
    be searched. A subfolder that disappears during the search is skipped.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    inside: list[Path] = []
    searched = set()
    top = folder.resolve()
    for place, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        relative = Path(place).relative_to(folder)
        state = Path(place).stat()
        # a link to a folder that was searched, or to one of its parents
        if (state.st_dev, state.st_ino) in searched:
            subfolders.clear()
            continue
        searched.add((state.st_dev, state.st_ino))
        skipped = [
            name
            for name in subfolders
            if name.startswith(".")
            or (Path(place, name).is_symlink() and top.is_relative_to(Path(place, name).resolve()))
        ]
        subfolders[:] = sorted(name for name in subfolders if name not in skipped)
        inside += [relative / name for name in (*names, *skipped)]
    return sorted(inside)
