"""Reads and writes ``excluded_rows``, the setting of a source that lists the rows to leave out.

Rows of a single file are named by number. In a folder, or a Hub dataset of several files, each file numbers
its own rows, so a row is named by its file too::

    3, 17, 40-45                          rows of the file; of a folder: these rows of every file
    a.jsonl: 3, 17; more/b.jsonl: 40-45   rows of two files of a folder

A name is the file's path inside the folder. If it contains ``;``, ``:`` or ``"``, it is written as a JSON
string.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import msgspec

from qlora_tui.errors import UsageError, UserError
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.schema import Source

_PART = re.compile(r"(\d{1,12})(?:\s*-\s*(\d{1,12}))?", re.ASCII)
_MOST_ROWS = 10_000_000


def parse_row_numbers(text: str) -> frozenset[int]:
    """Return the rows, from 1, that a text lists. Raises UserError for any other text."""
    ranges: list[range] = []
    rows = 0
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _PART.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not 1 <= first <= last or rows + last - first >= _MOST_ROWS:
            raise UsageError(
                "No row numbers",
                what=f"{part!r} in excluded_rows is neither a row number nor a range of row numbers.",
                fix='Write numbers and ranges: "3, 17, 40-45". For a file in a folder: "a.jsonl: 3, 17".',
            )
        ranges.append(range(first, last + 1))
        rows += len(ranges[-1])
    return frozenset(chain.from_iterable(ranges))


def format_row_numbers(numbers: Iterable[int]) -> str:
    """Return the shortest text for these rows, in order: 3, 4, 5 and 9 give ``3-5, 9``."""
    parts = []
    ordered = sorted(set(numbers))
    for _, pairs in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in pairs]
        parts.append(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts)


_GROUP = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")\s*:|([^;:"]+):)?([^;:"]*)(?:;|\Z)')
_PLAIN_NAME = re.compile(r"(?!\s)[^;:\"\x00-\x1f\x7f\ud800-\udfff]+(?<!\s)")
EVERY_FILE = ""
"""Key of the rows that are left out of every file of a source. If the source is a single file, this is also
the key of that file.
"""


class RowPlace(NamedTuple):
    """One row of a source."""

    file: str
    """Name of its file in the source; empty if the source is one file."""
    row: int
    """Number in its file, from 1."""

    def __str__(self) -> str:
        """Return ``17``, or ``part-2.jsonl:17``."""
        return f"{self.file}:{self.row:,}" if self.file else f"{self.row:,}"


Excluded = Mapping[str, frozenset[int]]
"""Rows keyed by the name of their file; rows under ``EVERY_FILE`` apply to all files."""


def parse_excluded_rows(text: str) -> Excluded:
    """Return the rows that a recipe's text lists. Raises UserError for any other text."""
    rows: dict[str, frozenset[int]] = {}
    for name, numbers in _groups(text):
        rows[name] = rows.get(name, frozenset()) | parse_row_numbers(numbers)
    return {name: numbers for name, numbers in rows.items() if numbers}


def format_excluded_rows(excluded: Excluded) -> str:
    """Return the recipe's text for these rows."""
    named = sorted(excluded.items())
    return "; ".join(f"{_prefix(name)}{format_row_numbers(numbers)}" for name, numbers in named if numbers)


def without_rows(source: Source, places: Iterable[RowPlace]) -> Source:
    """Return the source with additional rows left out."""
    excluded = dict(parse_excluded_rows(source.excluded_rows))
    for name, row in places:
        excluded[name] = excluded.get(name, frozenset()) | {row}
    return msgspec.structs.replace(source, excluded_rows=format_excluded_rows(excluded))


def is_excluded(excluded: Excluded, place: RowPlace) -> bool:
    """Return whether a row is left out."""
    return any(place.row in excluded.get(name, ()) for name in (EVERY_FILE, place.file))


def file_names(source_path: str, paths: Sequence[Path]) -> list[str]:
    """Return the name of each file of a source: its path inside the folder; empty if the source is one file.

    Args:
        source_path: the source's path, or the ID of a Hub dataset.
        paths: all files of the source.
    """
    folder = Path(source_path).expanduser()
    if not folder.exists():  # a dataset of the Hub
        if len(paths) == 1:
            return [EVERY_FILE]
        folder = Path(os.path.commonpath([path.parent for path in paths]))
    elif paths == [folder]:
        return [EVERY_FILE]
    return [
        path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name for path in paths
    ]


def excluded_by_path(source: Source, paths: Sequence[Path]) -> dict[Path, frozenset[int]]:
    """Return the rows to leave out of each file of a source.

    Raises:
        UserError: the text cannot be parsed, or names a file that the source does not have.
    """
    if not source.excluded_rows:
        return {}
    excluded = parse_excluded_rows(source.excluded_rows)
    names = file_names(source.path, paths)
    # A single file may also be listed under its own name.
    known = {name or path.name: path for name, path in zip(names, paths, strict=True)}
    for name in excluded:
        if name and name not in known:
            raise UsageError(
                "No such file in the source",
                what=f"excluded_rows names {name!r}, but {source.path} has no such data file.",
                why="The file was renamed or deleted, or its name marks it as validation or test data.",
                fix="Rename it back, or correct excluded_rows of the source in the recipe.",
            )
    everywhere = excluded.get(EVERY_FILE, frozenset())
    return {path: everywhere | excluded.get(name, frozenset()) for name, path in known.items()}


def _groups(text: str) -> Iterator[tuple[str, str]]:
    """Yield file name and row numbers of each group."""
    place = 0
    while place < len(text):
        group = _GROUP.match(text, place)
        try:
            name = json.loads(group[1]) if group and group[1] else (group[2] or "").strip() if group else None
        except ValueError:
            name = None
        if group is None or name is None or ((group[1] or group[2]) and not name):
            raise UsageError(
                "No row numbers",
                what=f"{text[place:].strip()!r} in excluded_rows is neither a row number nor rows in a file.",
                fix='Write numbers and ranges: "3, 17, 40-45". For files: "a.jsonl: 3, 17; b.jsonl: 40-45".',
            )
        yield name, group[3]
        place = group.end()


def all_excluded(count: int) -> UserError:
    """Build the error for sources whose ``count`` rows are all excluded."""
    return UsageError(
        "Nothing to train on",
        what=f"All {pluralize(count, 'row')} of the data are excluded.",
        fix="Correct excluded_rows of the source in the recipe, or clear it.",
    )


def _prefix(name: str) -> str:
    if not name:
        return ""
    return f"{name if _PLAIN_NAME.fullmatch(name) else json.dumps(name)}: "
