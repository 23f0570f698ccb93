"""Line numbers of keys in a TOML text, for error messages.

``tomllib`` reads values only. This scans for table headers and ``key =`` in texts that ``tomllib`` has
already accepted; a key it misses merely has no line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

Key = tuple[str | int, ...]
"""``("lora", "rank")``; ``("data", "sources", 0, "path")``."""

_OPAQUE = re.compile(
    r'"""(?:\\.|[^\\])*?"""+' r"|'''.*?'''+" r'|"(?:\\.|[^"\\\n])*"' r"|'[^'\n]*'" r"|#[^\n]*",
    re.DOTALL,
)
"""Strings and comments, in which brackets and equals signs have no meaning."""
_SYNTAX = re.compile(r"[\[\]{}=#.,\"']")
_NAME = r"[\w-]+(?:\s*\.\s*[\w-]+)*"
_HEADER = re.compile(rf"\s*(\[\[?)\s*({_NAME})\s*\]")
_ASSIGNMENT = re.compile(rf"\s*({_NAME})\s*=")


def key_lines(text: str) -> dict[Key, int]:
    """Return the line of each key and table, from 1. Keys of inline tables are not included."""
    line_numbers: dict[Key, int] = {}
    arrays: dict[Key, int] = {}
    table: Key = ()
    depth = 0
    for number, line in enumerate(_OPAQUE.sub(_blank, text).split("\n"), start=1):
        header = _HEADER.match(line) if depth == 0 else None
        if header:
            table = _inside_arrays(_parts(header[2]), arrays)
            if header[1] == "[[":
                line_numbers.setdefault(table, number)
                arrays[table] = arrays.get(table, -1) + 1
                table = (*table, arrays[table])
            line_numbers[table] = number
            continue
        assignment = _ASSIGNMENT.match(line) if depth == 0 else None
        if assignment:
            parts = _parts(assignment[1])
            for end in range(1, len(parts) + 1):
                line_numbers.setdefault(table + parts[:end], number)
        depth += sum(line.count(mark) for mark in "[{") - sum(line.count(mark) for mark in "]}")
    return line_numbers


def line_of(lines: Mapping[Key, int], key: Key) -> int | None:
    """Line of ``key``, or of the closest enclosing table; None if unknown."""
    while key:
        if key in lines:
            return lines[key]
        key = key[:-1]
    return None


def _blank(match: re.Match[str]) -> str:
    text = match[0]
    return "" if text.startswith("#") else _SYNTAX.sub("", text)


def _parts(dotted: str) -> Key:
    return tuple(part.strip() for part in dotted.split("."))


def _inside_arrays(parts: Key, arrays: dict[Key, int]) -> Key:
    """Insert array indices: ``data.sources.columns`` after ``[[data.sources]]`` is in the last source."""
    key: Key = ()
    for position, part in enumerate(parts):
        key = (*key, part)
        if position < len(parts) - 1 and key in arrays:
            key = (*key, arrays[key])
    return key
