"""One row of a file by its number, without reading all that comes before it where that can be helped.

Lines of a JSONL file are found through an index of where each megabyte's lines begin, built once at
the speed of the disk. Other files are read up to the row.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path

from qlora_tui.data.open_file import CHUNK_BYTES
from qlora_tui.data.read import jsonl_row, rows
from qlora_tui.data.row import Row

_INDEXED_BYTES = 4 << 20
"""Smaller files are read from their start."""


def row_at(path: Path, number: int) -> Row | None:
    """The row with this number, or the next there is; None if the file ends before. Raises ``Problem``."""
    stat = path.stat()
    if path.name.lower().endswith((".jsonl", ".ndjson")) and stat.st_size >= _INDEXED_BYTES:
        return _line_row(path, number, _lines_before(path, stat.st_size, stat.st_mtime_ns))
    return next((row for row in rows(path) if row.number >= number), None)


@lru_cache(maxsize=4)
def _lines_before(path: Path, size: int, modified_ns: int) -> array[int]:
    """How many line ends come before each megabyte of a file of this size and age."""
    counts = array("Q")
    seen = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            counts.append(seen)
            seen += chunk.count(b"\n")
    return counts


def _line_row(path: Path, number: int, lines_before: array[int]) -> Row | None:
    chunk = max(0, bisect_left(lines_before, number - 1) - 1)
    with path.open("rb") as file:
        file.seek(chunk * CHUNK_BYTES)
        for line_number, line in enumerate(file, lines_before[chunk] + 1):
            if line_number >= number:
                row = jsonl_row(line_number, line.removeprefix(b"\xef\xbb\xbf") if line_number == 1 else line)
                if row is not None:
                    return row
    return None
