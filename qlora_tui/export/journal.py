"""What of an interrupted export is complete, so that the next one does not compute it again.

``journal`` in the export's folder of unfinished files has a line of JSON for each result: a value such as the
choice of base weights or a proof, or the digest of what was written to a file. Nothing waits for the disk:
after a power cut the digests show what it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

import msgspec
from msgspec import Struct

_NAME = "journal"
_CHUNK = 1 << 20
T = TypeVar("T", bound=Struct)


class Digest(Struct, frozen=True):
    """Data as it was written."""

    size: int
    """In bytes."""
    sha256: str

    @classmethod
    def of(cls, data: bytes | memoryview) -> Digest:
        """Return the digest of bytes in memory."""
        return cls(memoryview(data).nbytes, hashlib.sha256(data).hexdigest())

    @classmethod
    def of_file(cls, path: Path) -> Digest:
        """Return the digest of a file. Raises OSError."""
        with path.open("rb") as file:
            return cls.of_next(file, path.stat().st_size)

    @classmethod
    def of_next(cls, file: IO[bytes], size: int) -> Digest:
        """Return the digest of the next ``size`` bytes, or of those up to the end. Raises OSError."""
        hashed, count = hashlib.sha256(), 0
        while chunk := file.read(min(_CHUNK, size - count)):
            hashed.update(chunk)
            count += len(chunk)
        return cls(count, hashed.hexdigest())


class _Entry(Struct, frozen=True):
    """One line."""

    name: str
    value: msgspec.Raw = msgspec.Raw(b"null")
    """Null where everything whose name begins with ``name`` is no longer complete."""


_ENTRIES = msgspec.json.Decoder(_Entry)


class Journal:
    """The results in one folder."""

    def __init__(self, folder: Path) -> None:
        """Read the journal in a folder, which exists. Raises OSError."""
        self.folder = folder
        self._path = folder / _NAME
        self._values: dict[str, msgspec.Raw] = {}
        self._read()

    def get(self, name: str, kind: type[T]) -> T | None:
        """Return a result; None where there is none."""
        value = self._values.get(name)
        try:
            return None if value is None else msgspec.json.decode(value, type=kind)
        except msgspec.MsgspecError:
            return None

    def record(self, name: str, value: Struct) -> None:
        """Add a result, or replace it. Raises OSError."""
        self._append(_Entry(name, msgspec.Raw(msgspec.json.encode(value))))

    def forget(self, beginning: str) -> None:
        """Remove every result whose name begins so. Raises OSError."""
        if any(name.startswith(beginning) for name in self._values):
            self._append(_Entry(beginning))

    def result(self, name: str, kind: type[T], compute: Callable[[], T]) -> T:
        """Return a result, which is computed and recorded unless there is one."""
        value = self.get(name, kind)
        if value is None:
            value = compute()
            self.record(name, value)
        return value

    def _append(self, entry: _Entry) -> None:
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(entry) + b"\n")
        self._apply(entry)

    def _apply(self, entry: _Entry) -> None:
        if bytes(entry.value) == b"null":
            self._values = {
                name: value for name, value in self._values.items() if not name.startswith(entry.name)
            }
        else:
            self._values[entry.name] = entry.value

    def _read(self) -> None:
        """Apply every line up to the first that is damaged, and delete the rest."""
        size = 0
        with suppress(FileNotFoundError):
            for line, entry in _entries(self._path):
                size += len(line)
                self._apply(entry)
            if size < self._path.stat().st_size:
                with self._path.open("r+b") as file:
                    file.truncate(size)


def _entries(path: Path) -> Iterator[tuple[bytes, _Entry]]:
    with path.open("rb") as file:
        for line in file:
            try:
                entry = _ENTRIES.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                return
            if not line.endswith(b"\n"):
                return
            # A copy: the line's buffer is not kept.
            yield line, _Entry(entry.name, msgspec.Raw(bytes(entry.value)))
