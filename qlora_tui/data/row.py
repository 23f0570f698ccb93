"""One row as a file gives it, before anyone knows its format."""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class Line(Struct, frozen=True):
    """One line of a JSONL file, not yet read: that is most of the work, and can be done elsewhere."""

    number: int
    text: bytes


class Row(Struct, frozen=True):
    """One row of a file, or why there is none."""

    number: int
    """From 1: the line in JSONL and text files, the record elsewhere (a CSV header does not count)."""
    value: Any = None
    """Field by name; a list or a string where the file holds bare lists or strings."""
    kind: str = ""
    """For a row that cannot be read: which check (``bad-json``, ``bad-encoding``, ``bad-row``)."""
    error: str = ""
    """And the reason, naming the line."""
