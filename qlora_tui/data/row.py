"""One row of a file, before its format is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct


class Line(Struct, frozen=True):
    """One unparsed line of a JSONL file: parsing is most of the work, and can run in another process."""

    number: int
    text: bytes


class Row(Struct, frozen=True):
    """One row of a file, or the error that explains why it cannot be read."""

    number: int
    """Row number from 1: the line in JSONL and text files, else the record (a CSV header does not count)."""
    value: Any = None
    """Value of each field; a list or a string where the file holds bare lists or strings."""
    kind: str = ""
    """Kind of error of a row that cannot be read: ``bad-json``, ``bad-encoding`` or ``bad-row``."""
    error: str = ""
    """Reason why the row cannot be read, naming the line."""
    warnings: tuple[tuple[str, str], ...] = ()
    """Kind (see ``problems.CHECKS``) and example of what reading it may have lost."""
    file_note: str = ""
    """What else the file holds and is not read, on its first row."""


def distinct_names(names: Sequence[str]) -> list[str]:
    """Return the names of columns, where a repeated one gets a number, as in pandas: ``answer.1``."""
    distinct: list[str] = []
    for name in names:
        number, unique = 0, name
        while unique in distinct:
            number += 1
            unique = f"{name}.{number}"
        distinct.append(unique)
    return distinct
