"""Folders that are published atomically, with a ``SHA256SUMS`` file for later verification.

``sha256sum -c SHA256SUMS`` verifies such a folder without this program.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_tui.files import open_to_read, read_regular
from qlora_tui.publishing import draft_path, held_draft, publish

NAME = "SHA256SUMS"


@contextmanager
def checked_folder(final: Path) -> Iterator[Path]:
    """Yield a draft to fill inside the block; at the end, publish it as ``final`` with checksums.

    Raises OSError if the folder cannot be written, or if another process writes it. After any exception, the
    draft is deleted and the previous content of ``final`` is restored.
    """
    with held_draft(draft_path(final)) as draft:
        if draft is None:
            raise BlockingIOError(errno.EAGAIN, "Another process is writing it", str(final))
        yield draft
        write_checksums(draft)
        publish(draft, final)


def write_checksums(folder: Path) -> None:
    """Write the hash of every file in ``folder`` and its subfolders."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / NAME).write_text("".join(lines), "utf-8")


def digest(folder: Path) -> str:
    """Return the hash of ``SHA256SUMS`` itself, which covers every file listed in it. Raises OSError."""
    return sha256(folder / NAME)


def mismatch(folder: Path, only: Collection[str] = (), listed: Collection[str] = ()) -> str | None:
    """Describe how the folder differs from ``SHA256SUMS``, in a clause; None if it matches or has no such
    file.

    Args:
        folder: The folder that contains the file.
        only: Names of the files to check; empty checks all.
        listed: Names of files that ``SHA256SUMS`` must have a checksum for.
    """
    required = {*only, *listed}
    try:
        lines = read_regular(folder / NAME).decode().splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        return f"{NAME} cannot be read ({error})"
    for line in lines:
        expected, separator, name = line.partition("  ")
        is_name = "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
        if not separator or len(expected) != 64 or not is_name:
            return f"{NAME} is damaged"
        required.discard(name)
        if only and name not in only:
            continue
        try:
            if (folder / name).exists() and not (folder / name).is_file():
                return f"{name} is not a file"
            if sha256(folder / name) != expected:
                return f"{name} has changed since it was written: its checksum differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    if required:
        return f"{NAME} does not list {min(required)}"
    return None if lines else f"{NAME} is empty"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    import hashlib  # imports OpenSSL, which a start without verification does not need

    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
