"""Access to one row of a file by its number, without reading all earlier rows where possible.

Lines of a JSONL file are found through an index of the lines in each megabyte, built at the speed of the disk
and only as far as needed. Other files are read up to the row.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path

from qlora_tui.data.bounds import LARGEST_ROW_BYTES
from qlora_tui.data.read import jsonl_row, rows
from qlora_tui.data.row import Row
from qlora_tui.data.text_reader import CHUNK_BYTES

_INDEXED_BYTES = 4 << 20
"""Smaller files are read from their start."""


def row_at(path: Path, number: int) -> Row | None:
    """Return the row with this number, or the next existing one; None past the end. Raises ``UserError``."""
    stat = path.stat()
    if path.name.lower().endswith((".jsonl", ".ndjson")) and stat.st_size >= _INDEXED_BYTES:
        return _line_row(path, number, _index(path, stat.st_size, stat.st_mtime_ns))
    return next((row for row in rows(path) if row.number >= number), None)


class _LineIndex:
    """Number of line ends before each megabyte of a file, counted only as far as needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = array("Q", [0])

    def chunk_of(self, line: int) -> tuple[int, int]:
        """Return the last megabyte that begins before this line, and the number of line ends before it."""
        if self._before[-1] < line - 1:
            self._count_on(line)
        chunk = max(0, bisect_left(self._before, line - 1) - 1)
        return chunk, self._before[chunk]

    def _count_on(self, line: int) -> None:
        with self._path.open("rb") as file:
            file.seek((len(self._before) - 1) * CHUNK_BYTES)
            while self._before[-1] < line - 1 and (chunk := file.read(CHUNK_BYTES)):
                self._before.append(self._before[-1] + chunk.count(b"\n"))


@lru_cache(maxsize=4)
def _index(path: Path, size: int, modified_ns: int) -> _LineIndex:
    """Return the index of a file with this size and modification time."""
    return _LineIndex(path)


def _line_row(path: Path, number: int, index: _LineIndex) -> Row | None:
    chunk, before = index.chunk_of(number)
    with path.open("rb") as file:
        file.seek(chunk * CHUNK_BYTES)
        # A line over the length limit comes in parts: the first reports that it is too long.
        lines = iter(lambda: file.readline(LARGEST_ROW_BYTES + 1), b"")
        for line_number, line in enumerate(lines, before + 1):
            if line_number >= number:
                row = jsonl_row(line_number, line.removeprefix(b"\xef\xbb\xbf") if line_number == 1 else line)
                if row is not None:
                    return row
    return None
