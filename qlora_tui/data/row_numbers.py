"""Row numbers as a recipe writes them: ``3, 17, 40-45``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain, groupby

from qlora_tui.errors import EXIT_USAGE, UserError

_PART = re.compile(r"(\d{1,12})(?:\s*-\s*(\d{1,12}))?", re.ASCII)
_MOST_ROWS = 10_000_000


def parse_row_numbers(text: str) -> frozenset[int]:
    """The rows that a text names, from 1. Raises UserError for a text that is something else."""
    ranges: list[range] = []
    rows = 0
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _PART.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not 1 <= first <= last or rows + last - first >= _MOST_ROWS:
            raise UserError(
                "No row numbers",
                what=f"{part!r} in excluded_rows is neither a row number nor a range of them.",
                fix='Write numbers and ranges, "3, 17, 40-45"; rows of a file in a folder, "a.jsonl: 3, 17".',
                exit_code=EXIT_USAGE,
            )
        ranges.append(range(first, last + 1))
        rows += len(ranges[-1])
    return frozenset(chain.from_iterable(ranges))


def format_row_numbers(numbers: Iterable[int]) -> str:
    """The shortest text for these rows, in order: 3, 4, 5 and 9 give ``3-5, 9``."""
    parts = []
    ordered = sorted(set(numbers))
    for _, pairs in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in pairs]
        parts.append(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts)
