"""Answers that take seconds to find, kept in the cache folder by what they depend on."""

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
    """Answers of one kind, a JSON file each. A damaged file counts as missing."""

    def __init__(self, kind: str, answer: type[T], *, max_bytes: int) -> None:
        """``kind``: folder within the cache folder; ``max_bytes``: of the largest file that is read."""
        self._kind = kind
        self._decoder = msgspec.json.Decoder(answer)
        self._max_bytes = max_bytes

    def find(self, key: bytes) -> T | None:
        """Return the answer under a key; None without one. Read once while its file stays as it is."""
        file = self._file(key)
        try:
            status = file.stat()
        except OSError:
            return None
        found: T | None = _read(file, (status.st_mtime_ns, status.st_size), self._decoder, self._max_bytes)
        return found

    def keep(self, key: bytes, answer: T, max_files: int) -> None:
        """Keep an answer; of more than ``max_files`` the oldest are deleted.

        Without room it is not kept, and neither is one with half a character, which JSON cannot hold.
        """
        with suppress(OSError, UnicodeEncodeError):
            file = self._file(key)
            private_dir(file.parent)
            atomic_write(file, msgspec.json.encode(answer))
            kept = sorted(list_folder(file.parent), key=lambda each: each.stat().st_mtime_ns)
            for old in kept[:-max_files]:
                old.unlink()

    def forget(self, key: bytes) -> None:
        """Delete the answer under a key, if there is one."""
        with suppress(OSError):
            self._file(key).unlink()

    def _file(self, key: bytes) -> Path:
        return cache_dir() / self._kind / f"{hashlib.sha256(key).hexdigest()}.json"


@lru_cache(maxsize=64)
def _read(file: Path, state: tuple[int, int], decoder: msgspec.json.Decoder[Any], max_bytes: int) -> Any:
    """Read a file, whose time and size are ``state``; None if it is damaged."""
    return read_json(file, decoder, max_bytes)
