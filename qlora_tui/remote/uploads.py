"""Sends the data files of a run to a box.

The box stores them in ``uploads/<hash>/<name>`` of its state folder, so the same content is sent only once.
An interrupted transfer is resumed. A folder is sent file by file, under the hash of its file list. The box
verifies the hash of a received file before renaming it to its final name. The program on the box receives the
files over ssh, so the box needs neither rsync nor sftp, which some rented boxes lack.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, Annotated

import msgspec
from msgspec import Meta, Struct

from qlora_tui import paths
from qlora_tui.errors import UserError, disk_problems
from qlora_tui.files import private_dir, walk_files
from qlora_tui.remote.ssh import Box

_PIECE_BYTES = 1 << 18
_LONGEST_ANSWER_BYTES = 1 << 16


class Offer(Struct, frozen=True):
    """A file that the app can send. The program on the box reads it as a line on stdin."""

    folder: str
    """Name of the folder on the box: a hash of the file or, if a folder is sent, of its list of files."""
    name: str
    """Name of the file, or its path starting with the name of the sent folder."""
    size: int
    sha256: str


class Wanted(Struct, frozen=True):
    """Reply of the box to an offer. After a transfer, the box sends another one."""

    path: str
    """Path of the file on the box."""
    offset: Annotated[int, Meta(ge=0)]
    """Number of bytes that the box already has."""
    is_whole: bool = False
    """Whether the box has the complete file, with the right hash."""


_OFFERS = msgspec.json.Decoder(Offer)
_WANTED = msgspec.json.Decoder(Wanted)


def send(box: Box, path: Path, on_progress: Callable[[int, int], object] = lambda sent, size: None) -> str:
    """Send a file or folder to the box, unless the box has it; return its path there.

    Args:
        box: The box.
        path: File or folder on this machine.
        on_progress: Called with the number of bytes that the box has, and the total.

    Raises:
        UserError: A file cannot be read or changes during the transfer, or the box cannot be reached.
    """
    # The name of "." is the name of its folder.
    path = path.resolve() if path.name in ("", "..") else path
    with disk_problems("The data could not be read", path, "Check the path and its permissions."):
        offers = list(_offers(path))
    channel = box.open_program("store", "receive")
    total, done, place = sum(offer.size for _, offer in offers), 0, ""
    try:
        for file, offer in offers:
            channel.write(msgspec.json.encode(offer) + b"\n")
            wanted = _WANTED.decode(channel.output.readline(_LONGEST_ANSWER_BYTES))
            if not wanted.is_whole:
                with file.open("rb") as opened:
                    opened.seek(wanted.offset)
                    left = max(0, offer.size - wanted.offset)
                    while left and (piece := opened.read(min(left, _PIECE_BYTES))):
                        channel.write(piece)
                        left -= len(piece)
                        on_progress(done + offer.size - left, total)
                    if left:
                        raise _changed(file)
                wanted = _WANTED.decode(channel.output.readline(_LONGEST_ANSWER_BYTES))
                if not wanted.is_whole:
                    raise _changed(file)
            done += offer.size
            on_progress(done, total)
            # The path of a folder is the path of its first file, without the part inside the folder.
            place = place or wanted.path.removesuffix(offer.name.removeprefix(path.name))
    except (OSError, msgspec.MsgspecError) as error:
        raise channel.lost_error() from error
    finally:
        channel.close()
    return place


def _changed(file: Path) -> UserError:
    return UserError(
        "The data changed while it was being sent",
        what=f"{file} changed between the first reading and the transfer.",
        fix="Try again when no program is writing to this file.",
    )


def _offers(path: Path) -> Iterator[tuple[Path, Offer]]:
    """Yield the files to send. Raises OSError, and UserError for anything that is not a regular file."""
    files = files_of(path)
    if not path.is_dir():
        digest = file_hash(path)
        yield path, Offer(digest, path.name, path.stat().st_size, digest)
        return
    named = [(file, f"{path.name}/{file.relative_to(path).as_posix()}", file_hash(file)) for file in files]
    folder = hashlib.sha256("".join(f"{digest} {name}\n" for _, name, digest in named).encode()).hexdigest()
    for file, name, digest in named:
        yield file, Offer(folder, name, file.stat().st_size, digest)
    if not named:
        raise FileNotFoundError(2, "the folder has no files", str(path))


def data_hash(path: str) -> str:
    """Return the hash under which data would be sent from this machine; empty if it cannot be sent."""
    try:
        return next(_offers(Path(path).expanduser()))[1].folder
    except (OSError, UserError):
        return ""


def files_of(path: Path) -> list[Path]:
    """Return the files to send for a path: the file itself, or those in a folder and its visible subfolders.

    Raises OSError, and UserError for anything that is not a regular file or whose name is not UTF-8.
    """
    files = [path / name for name in walk_files(path)] if path.is_dir() else [path]
    files = [file for file in files if file == path or not file.is_dir()]
    for file in files:
        is_utf8 = os.fsencode(file).decode(errors="replace") == str(file)
        if not (is_utf8 and file.is_file()):
            raise UserError(
                "The data cannot be sent",
                what=f"{str(file)!r} is not a file." if is_utf8 else f"{str(file)!r} is not UTF-8.",
                why="Only regular files can be sent, because they are read more than once. This may be a "
                "pipe or a broken link."
                if is_utf8
                else "File names are sent as UTF-8.",
                fix="Save the content to a file, or delete the link." if is_utf8 else "Rename the file.",
            )
    return files


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def receive(source: IO[bytes], answers: IO[bytes]) -> None:
    """Receive files until there are no more or a transfer fails. This is the box's side of :func:`send`."""
    for header in iter(source.readline, b""):
        offer = _OFFERS.decode(header)
        file = _place(offer)
        part = file.with_name(f"{file.name}.part")
        if file.exists():
            _answer(answers, Wanted(str(file), offer.size, is_whole=True))
            continue
        private_dir(file.parent)
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as opened:
            # Request at least the last byte, because only a complete transfer is verified against its hash.
            offset = max(0, min(opened.seek(0, os.SEEK_END), offer.size - 1))
            opened.truncate(offset)
            opened.seek(offset)
            _answer(answers, Wanted(str(file), offset))
            left = offer.size - offset
            while left and (piece := source.read1(min(left, _PIECE_BYTES))):  # type: ignore[attr-defined]
                opened.write(piece)
                left -= len(piece)
            opened.flush()
            os.fsync(opened.fileno())
            opened.seek(0)
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if left:
            return
        if digest != offer.sha256:
            # The app sends it again from the beginning.
            part.unlink(missing_ok=True)
            _answer(answers, Wanted(str(file), 0))
            return
        # Another app that sends the same data may have finished first.
        with suppress(FileNotFoundError):
            part.rename(file)
        _answer(answers, Wanted(str(file), offer.size, is_whole=True))


def _place(offer: Offer) -> Path:
    inside = PurePosixPath(offer.folder, offer.name)
    if not offer.folder.isalnum() or inside.is_absolute() or ".." in inside.parts:
        raise ValueError(offer.name)
    return paths.state_dir() / "uploads" / inside


def _answer(answers: IO[bytes], wanted: Wanted) -> None:
    answers.write(msgspec.json.encode(wanted) + b"\n")
    answers.flush()


def receive_from_stdin() -> int:
    """Receive files from the app over stdin and stdout; return the exit code."""
    receive(sys.stdin.buffer, sys.stdout.buffer)
    return 0
