"""Navigation from row to row of a source, through all its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from qlora_tui.data.dataset_report import FileReport
from qlora_tui.data.problems import DataProblem

Place: TypeAlias = tuple[str, int]
"""A file, and a row of it; an empty path is the first file."""


def neighbor(place: Place, by: int, files: Sequence[FileReport]) -> Place:
    """The next or previous row, or the same one at either end.

    The last row of a file is known once it has been read.
    """
    path, row = place
    number = _number(path, files)
    # Rows of a JSONL file are lines, some of them blank: only the last is sure to be there.
    if by > 0 and files and row >= (files[number].last_row or row + 1):
        return (files[number + 1].path, 1) if number + 1 < len(files) else place
    if by < 0 and row == 1:
        return (files[number - 1].path, max(1, files[number - 1].last_row)) if number else place
    return path, max(1, row + by)


def parse_place(text: str, path: str, files: Sequence[FileReport]) -> Place | None:
    """The place a user names: ``17``, or ``part-2 17``, with a part of a file's name."""
    name, _, digits = text.strip().rpartition(" ")
    digits = digits.replace(",", "")
    if not digits.isdigit() or int(digits) < 1:
        return None
    if name.strip():
        matches = (file.path for file in files if name.strip().lower() in Path(file.path).name.lower())
        path = next(matches, "")
        return (path, int(digits)) if path else None
    return path, int(digits)


def next_problem(
    problems: Sequence[DataProblem], place: Place, by: int, files: Sequence[FileReport]
) -> Place | None:
    """The next place with one of these problems, after the last the first again; None if none has a row."""
    places = sorted({(_number(p.path, files), row) for p in problems for row in p.rows})
    if not places:
        return None
    here = _number(place[0], files), place[1]
    if by > 0:
        number, row = next((one for one in places if one > here), places[0])
    else:
        number, row = next((one for one in reversed(places) if one < here), places[-1])
    return (files[number].path if files else ""), row


def _number(path: str, files: Sequence[FileReport]) -> int:
    return next((n for n, file in enumerate(files) if file.path == path), 0)
