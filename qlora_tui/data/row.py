"""One row of a file, before its format is known, and bounds on how much of a file is read into memory.

The bounds are far above any real data set. A few kilobytes can describe terabytes, such as one long line
under compression: content over a bound is rejected with an error that names file, place and bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from qlora_tui.errors import UserError


class Line(Struct, frozen=True):
    """One unparsed line of a JSONL file: parsing is most of the work, and can run in another process."""

    number: int
    text: bytes


class Row(Struct, frozen=True):
    """One row of a file, or the error that explains why it cannot be read."""

    number: int
    """Row number from 1: the line in JSONL and text files, else the record (a CSV header does not count)."""
    value: Any = None
    """Value of each field; a list or a string if the file holds bare lists or strings."""
    kind: str = ""
    """Kind of error of a row that cannot be read: ``bad-json``, ``bad-encoding`` or ``bad-row``."""
    error: str = ""
    """Reason why the row cannot be read, naming the line."""
    warnings: tuple[tuple[str, str], ...] = ()
    """Kind (see ``problems.CHECKS``) and example of what reading it may have lost."""
    file_note: str = ""
    """What else the file holds and is not read, on its first row."""


def distinct_names(names: Sequence[str]) -> list[str]:
    """Return the names of columns; a repeated one gets a number, as in pandas: ``answer.1``."""
    distinct: list[str] = []
    for name in names:
        number, unique = 0, name
        while unique in distinct:
            number += 1
            unique = f"{name}.{number}"
        distinct.append(unique)
    return distinct


MIB = 1 << 20
LARGEST_ROW_BYTES = 16 * MIB
"""Most bytes of a line, JSON value, CSV row, paragraph or record: some four million tokens."""
MAX_VALUES = 3_000_000
"""Most values in one JSON value, which may be a whole file; each takes up to 80 bytes as a Python object."""
MAX_VALUES_IN_LINE = 250_000
MAX_CHARACTERS = 2_000_000
"""Most characters of one rendered conversation: a tokenizer takes some 350 bytes for each."""
DEEPEST = 100
"""Deepest nesting of lists and objects."""
_PART_BYTES = 64
UNQUESTIONED_BYTES = 64 * MIB
MAX_EXPANSION = 1000
"""Most bytes read for each byte on disk, once more than ``UNQUESTIONED_BYTES`` have been read. Real text
compresses to between a third and a fiftieth."""


class DamagedFileError(UserError):
    """The content of a file cannot be read to its end, whenever it is tried."""


class TooLarge(Exception):
    """Something in a file is over a bound; the message names the place in the file and the bound."""


def too_large(path: Path, error: TooLarge) -> DamagedFileError:
    """Build the error shown to the user."""
    return DamagedFileError(
        "Too large to read",
        what=f"{path}: {error}.",
        why="Such data is damaged, or built to exhaust memory.",
        fix="Split the row or file into smaller ones, or choose another.",
    )


def row_too_large(place: str) -> TooLarge:
    """Build the error for a row over the size bound; ``place`` names the line or row."""
    return TooLarge(f"{place} is larger than {LARGEST_ROW_BYTES // MIB} MiB")


def check_expansion(disk_bytes: int, read_bytes: int) -> None:
    """Raise ``TooLarge`` if ``read_bytes`` is too much for a file of ``disk_bytes``."""
    if read_bytes > UNQUESTIONED_BYTES and read_bytes > MAX_EXPANSION * max(1, disk_bytes):
        raise TooLarge(
            f"{disk_bytes:,} bytes of it became {read_bytes // MIB:,} MiB, more than {MAX_EXPANSION:,} to 1"
        )


def line_over_bound(line: bytes) -> str:
    """Return why a line of JSON is over a bound, before it is decoded; empty if it is not."""
    if len(line) > LARGEST_ROW_BYTES:
        return f"it is larger than {LARGEST_ROW_BYTES // MIB} MiB"
    if len(line) > MAX_VALUES_IN_LINE and sum(map(line.count, (b",", b"[", b"{"))) > MAX_VALUES_IN_LINE:
        return f"it holds more than {MAX_VALUES_IN_LINE:,} values"
    return ""


def rough_bytes(value: Any) -> int:
    """Estimate the bytes of a decoded value: characters of strings, and a constant for each part."""
    if isinstance(value, str):
        return _PART_BYTES + len(value)
    if isinstance(value, dict):
        return _PART_BYTES + sum(map(rough_bytes, value.values()))
    return _PART_BYTES + (sum(map(rough_bytes, value)) if isinstance(value, list) else 0)


def is_too_deep(value: Any, left: int = DEEPEST) -> bool:
    """Return whether lists and objects are nested deeper than ``DEEPEST``."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    if not left:
        return True
    return any(is_too_deep(part, left - 1) for part in value if isinstance(part, dict | list))
