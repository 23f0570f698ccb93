"""Results that take seconds to compute, stored in the cache folder under a key made from their inputs."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from qlora_tui.decoding import read_json
from qlora_tui.files import atomic_write, list_folder, private_dir
from qlora_tui.paths import cache_dir

T = TypeVar("T")


class AnswerCache(Generic[T]):
    """A cache for results of one kind. Each result is a JSON file; a damaged file counts as missing."""

    def __init__(self, kind: str, answer: type[T], *, max_bytes: int) -> None:
        """Open the cache in the folder ``kind``. Files larger than ``max_bytes`` are not read."""
        self._kind = kind
        self._decoder = msgspec.json.Decoder(answer)
        self._max_bytes = max_bytes

    def find(self, key: bytes) -> T | None:
        """Return the result under a key; None if there is none. An unchanged file is read only once."""
        file = self._file(key)
        try:
            status = file.stat()
        except OSError:
            return None
        found: T | None = _read(file, (status.st_mtime_ns, status.st_size), self._decoder, self._max_bytes)
        return found

    def keep(self, key: bytes, answer: T, max_files: int) -> None:
        """Store a result, and delete the oldest ones beyond ``max_files``.

        A result is not stored if the disk is full, or if it contains lone surrogates, which JSON cannot
        represent.
        """
        with suppress(OSError, UnicodeEncodeError):
            file = self._file(key)
            private_dir(file.parent)
            atomic_write(file, msgspec.json.encode(answer))
            kept = sorted(list_folder(file.parent), key=lambda each: each.stat().st_mtime_ns)
            for old in kept[:-max_files]:
                old.unlink()

    def forget(self, key: bytes) -> None:
        """Delete the result under a key, if there is one."""
        with suppress(OSError):
            self._file(key).unlink()

    def _file(self, key: bytes) -> Path:
        return cache_dir() / self._kind / f"{hashlib.sha256(key).hexdigest()}.json"


@lru_cache(maxsize=64)
def _read(file: Path, state: tuple[int, int], decoder: msgspec.json.Decoder[Any], max_bytes: int) -> Any:
    """Read a file whose time and size are ``state``; return None if it is damaged."""
    return read_json(file, decoder, max_bytes)
