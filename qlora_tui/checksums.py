"""Folders that are written whole, with a ``SHA256SUMS`` to compare with what is read later.

``sha256sum -c SHA256SUMS`` checks such a folder without this program.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_tui.files import open_to_read, private_dir, publish, read_regular

NAME = "SHA256SUMS"


@contextmanager
def checked_folder(final: Path, draft: Path) -> Iterator[Path]:
    """Fill ``draft`` within the ``with``; after it the folder is on the disk as ``final``, with checksums.

    Raises OSError when it cannot be written. After any exception the draft is gone, and what ``final`` was
    before is in its place.
    """
    shutil.rmtree(draft, ignore_errors=True)
    try:
        yield private_dir(draft)
        write_checksums(draft)
        publish(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def write_checksums(folder: Path) -> None:
    """Hash every file in ``folder``, in folders within it too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / NAME).write_text("".join(lines), "utf-8")


def digest(folder: Path) -> str:
    """The hash of ``SHA256SUMS`` itself, which covers every file it lists. Raises OSError."""
    return _sha256(folder / NAME)


def mismatch(folder: Path, only: Collection[str] = (), listed: Collection[str] = ()) -> str | None:
    """What differs from ``SHA256SUMS``, in a clause; None where nothing does, or the file is not there.

    Args:
        folder: The folder that has the file.
        only: Names of the files to look at, where not all of them are to be read.
        listed: Names of files that ``SHA256SUMS`` must have a checksum of.
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
            if _sha256(folder / name) != expected:
                return f"{name} is not what was written: its checksum differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    if required:
        return f"{NAME} does not list {min(required)}"
    return None if lines else f"{NAME} is empty"


def _sha256(path: Path) -> str:
    import hashlib  # it loads OpenSSL, which a start that checks nothing need not

    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
