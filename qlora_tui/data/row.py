"""A row of a file before its format is known, and limits on how much of a file is read into memory.

The limits are far above any real data set. A compressed file of a few kilobytes can expand to terabytes, so
content over a limit is rejected with an error that names file, place and limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from qlora_tui.errors import UserError


class Line(Struct, frozen=True):
    """One line of a JSONL file, not yet parsed: parsing is slow and can be left to another process."""

    number: int
    text: bytes


class Row(Struct, frozen=True):
    """One row of a file, or the error that explains why it cannot be read."""

    number: int
    """Row number from 1: the line in JSONL and text files, else the record (a CSV header is not counted)."""
    value: Any = None
    """The fields with their values; a list or a string if the file holds bare lists or strings."""
    kind: str = ""
    """Kind of error if the row cannot be read: ``bad-json``, ``bad-encoding`` or ``bad-row``."""
    error: str = ""
    """Reason why the row cannot be read, naming the line."""
    warnings: tuple[tuple[str, str], ...] = ()
    """Kind (see ``problems.CHECKS``) and example of content that may have been lost in reading."""
    file_note: str = ""
    """On a file's first row: description of other content of the file that is not read."""


def distinct_names(names: Sequence[str]) -> list[str]:
    """Return column names in which repeated names have a number, as in pandas: ``answer.1``."""
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
"""Maximum size of a line, JSON value, CSV row, paragraph or record: about four million tokens."""
MAX_VALUES = 3_000_000
"""Maximum number of values in one JSON value, which may be a whole file.

Each value takes up to 80 bytes as a Python object.
"""
MAX_VALUES_IN_LINE = 250_000
MAX_CHARACTERS = 2_000_000
"""Maximum number of characters of one rendered conversation: a tokenizer takes about 350 bytes for each."""
DEEPEST = 100
"""Maximum nesting depth of lists and objects."""
_PART_BYTES = 64
UNQUESTIONED_BYTES = 64 * MIB
MAX_EXPANSION = 1000
"""Maximum number of bytes read for each byte on disk, once more than ``UNQUESTIONED_BYTES`` have been read.

Real text compresses to between a third and a fiftieth.
"""


class DamagedFileError(UserError):
    """The file's content cannot be read to its end, and repeating the attempt does not help."""


class TooLarge(Exception):
    """Raised if content of a file exceeds a limit; the message names the place in the file and the limit."""


def too_large(path: Path, error: TooLarge) -> DamagedFileError:
    """Build the error shown to the user."""
    return DamagedFileError(
        "Too large to read",
        what=f"{path}: {error}.",
        why="Such data is damaged, or built to exhaust memory.",
        fix="Split the row or file into smaller ones, or choose another.",
    )


def row_too_large(place: str) -> TooLarge:
    """Build the error for a row over the size limit; ``place`` names the line or row."""
    return TooLarge(f"{place} is larger than {LARGEST_ROW_BYTES // MIB} MiB")


def check_expansion(disk_bytes: int, read_bytes: int) -> None:
    """Raise ``TooLarge`` if ``read_bytes`` is too much for a file of ``disk_bytes``."""
    if read_bytes > UNQUESTIONED_BYTES and read_bytes > MAX_EXPANSION * max(1, disk_bytes):
        raise TooLarge(
            f"{disk_bytes:,} bytes of the file expand to {read_bytes // MIB:,} MiB, "
            f"a ratio of more than {MAX_EXPANSION:,} to 1"
        )


def line_over_bound(line: bytes) -> str:
    """Return why a line of JSON exceeds a limit, before it is decoded; empty if it does not."""
    if len(line) > LARGEST_ROW_BYTES:
        return f"it is larger than {LARGEST_ROW_BYTES // MIB} MiB"
    if len(line) > MAX_VALUES_IN_LINE and sum(map(line.count, (b",", b"[", b"{"))) > MAX_VALUES_IN_LINE:
        return f"it contains more than {MAX_VALUES_IN_LINE:,} values"
    return ""


def rough_bytes(value: Any) -> int:
    """Estimate the bytes of a decoded value: the characters of strings, and a constant for each part."""
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
