"""A local copy of the runs of a box. In an app that works on a box, all readers of runs use this copy.

Only the box changes runs, and the copy follows. Small files are replaced as a whole, growing files are
appended to, and weight files are sparse: they have the right size but no content. A run appears once its copy
is complete. The box determines the status of a run, because only the box can look up its processes.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import msgspec

from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write, private_dir, read_regular
from qlora_tui.publishing import discard
from qlora_tui.recipe.toml import parse
from qlora_tui.remote.messages import Gone, KnownFile, Piece, Queue, Whole

_COMING = ".coming-"
"""Prefix of the folder of a run whose copy is incomplete."""
_RECIPE = "recipe.toml"
_END_BYTES = 4096
_GROWING = (".jsonl", ".log")


def grows(path: str) -> bool:
    """Return whether a file of a run is only ever appended to."""
    return path.endswith(_GROWING)


def end_crc(file: Path, size: int) -> int:
    """Return the CRC-32 of the bytes before the offset ``size``, at most the last 4,096. Raises OSError."""
    with file.open("rb") as opened:
        opened.seek(max(0, size - _END_BYTES))
        return zlib.crc32(opened.read(min(size, _END_BYTES)))


class Mirror:
    """The mirror, which one thread writes."""

    def __init__(self, state_dir: Path) -> None:
        self._state = state_dir
        self.texts_there: set[str] = set()
        """Texts in recipes from the box. Paths among these are paths on the box."""
        self._runs = private_dir(state_dir / "runs")
        for left in self._runs.glob(f"{_COMING}*"):
            discard(left)
        for recipe in self._runs.glob(f"*/{_RECIPE}"):
            with suppress(OSError):
                self.texts_there.update(_texts_of(read_regular(recipe, _CARRIED_BYTES)))

    def known(self) -> tuple[KnownFile, ...]:
        """Return the files that the mirror already has."""
        return tuple(self._known())

    def _known(self) -> Iterator[KnownFile]:
        for folder, _, names in os.walk(self._runs):
            for name in names:
                file = Path(folder, name)
                path = file.relative_to(self._runs).as_posix()
                if path.startswith(("..", _COMING)):
                    continue
                status = file.stat()
                crc = end_crc(file, status.st_size) if grows(path) else 0
                yield KnownFile(path, status.st_size, status.st_mtime_ns, crc)

    def apply(self, message: Piece | Gone | Whole | Queue) -> None:
        """Apply a change. Raises OSError, and UserError if a path leads out of the mirror."""
        match message:
            case Piece():
                self._write(message)
            case Gone():
                self._remove(message.path)
            case Whole():
                coming = self._runs / f"{_COMING}{_inside(message.run)}"
                if coming.is_dir():
                    coming.rename(self._runs / message.run)
            case Queue():
                atomic_write(self._state / "queue.json", msgspec.json.encode(message.ids))

    def _write(self, piece: Piece) -> None:
        file = self._place(piece.path)
        if file.name == _RECIPE:
            self.texts_there.update(_texts_of(piece.data))
        private_dir(file.parent)
        if grows(piece.path):
            with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b") as opened:
                # Never extend the file, because a hole takes no disk space but much memory when read.
                opened.truncate(min(piece.offset, opened.seek(0, os.SEEK_END)))
                opened.seek(0, os.SEEK_END)
                opened.write(piece.data)
        elif piece.size == len(piece.data):
            atomic_write(file, piece.data)
        else:
            file.unlink(missing_ok=True)
            file.touch(mode=0o600)
            os.truncate(file, piece.size)
        os.utime(file, ns=(piece.mtime_ns, piece.mtime_ns))

    def _remove(self, path: str) -> None:
        place = self._place(path)
        if place.is_dir():
            discard(place)
            return
        place.unlink(missing_ok=True)
        # Folders are not sent, so remove folders without files, except the folder of a run.
        with suppress(OSError):
            for folder in place.relative_to(self._runs).parents[:-2]:
                (self._runs / folder).rmdir()

    def _place(self, path: str) -> Path:
        inside = _inside(path)
        run = self._runs / inside.parts[0]
        if run.is_dir():
            return self._runs / inside
        return self._runs / f"{_COMING}{inside}"


def _texts_of(recipe: bytes) -> set[str]:
    texts = set[str]()

    def collect(value: object) -> None:
        if isinstance(value, str):
            texts.add(value)
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                collect(item)

    # A damaged recipe cannot be launched again, so its texts do not matter.
    with suppress(UserError):
        collect(parse(recipe.decode(errors="replace"), _RECIPE))
    return texts


def _inside(path: str) -> PurePosixPath:
    """Return a path relative to the runs folder. Raises UserError if it leads elsewhere."""
    inside = PurePosixPath(path)
    if not inside.parts or inside.is_absolute() or ".." in inside.parts or path.startswith(("..", _COMING)):
        raise UserError(
            "The box sent a path outside its runs",
            what=f"{path!r} points outside the runs folder.",
            fix="Do not work on this box: its copy of qlora-tui may have been tampered with.",
        )
    return inside


def carried(path: str, size: int) -> bool:
    """Return whether a file's content is sent. That of weights, training states and large files is not."""
    if grows(path):
        return True
    return size <= (_SMALL_BYTES if "/checkpoints/" in path else _CARRIED_BYTES) and not path.endswith(
        _WEIGHTS
    )


_SMALL_BYTES = 64 << 10
_CARRIED_BYTES = 16 << 20
_WEIGHTS = (".safetensors", ".pt", ".bin", ".gguf")


def read_piece(path: str, file: Path, size: int, mtime_ns: int) -> Piece:
    """Return the only piece of a file that does not grow, with or without its content. Raises OSError."""
    if not carried(path, size):
        return Piece(path, 0, b"", mtime_ns, size)
    data = read_regular(file, _CARRIED_BYTES)
    return Piece(path, 0, data, mtime_ns, len(data))
