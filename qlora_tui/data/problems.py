"""The kinds of things that are wrong with data, and the tally of where.

``CHECKS`` declares each kind once: how bad it is, what it means, and what to do. ``Tally`` counts
them while rows stream by, keeping the first row numbers and one example of each.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

KEPT_ROWS = 1000
"""Row numbers kept of each kind; the count goes on."""
EXAMPLE_CHARACTERS = 200


class Check(Struct, frozen=True):
    """One thing that can be wrong."""

    severity: Literal["error", "warning"]
    """An error blocks a run; a warning does not."""
    title: str
    fix: str


CHECKS: dict[str, Check] = {
    "bad-json": Check(
        "error", "Not valid JSON", "Mend or remove the line; a truncated download is the usual cause."
    ),
    "bad-encoding": Check("error", "Not UTF-8", "Convert the file: iconv -f LATIN1 -t UTF-8 OLD > NEW."),
    "bad-row": Check(
        "error", "Not a row", "Every row must be an object with named fields, with as many values as names."
    ),
    "wrong-format": Check(
        "error", "Not in the format of the rest", "Set the format by hand, or mend the row."
    ),
    "unsupported-part": Check(
        "error", "A part that is not text", "Remove images, audio and files: only text can be trained on."
    ),
    "unknown-role": Check("error", "Unknown role", "Roles are system, user, assistant and tool."),
    "empty-row": Check(
        "warning", "Empty row", "Nothing to learn: the row is left out. Remove it from the file."
    ),
    "no-answer": Check(
        "warning", "No answer to learn", "The row has no assistant turn that trains and is left out."
    ),
    "role-order": Check(
        "warning", "Roles out of order", "Turns should alternate, user first; the row is used as it is."
    ),
    "template-refuses": Check(
        "warning",
        "The chat template refuses the row",
        "The row is left out. Reorder or merge its turns as the message asks.",
    ),
}


class DataProblem(Struct, frozen=True):
    """One kind of problem in one source."""

    kind: str
    severity: Literal["error", "warning"]
    title: str
    count: int
    rows: tuple[int, ...]
    """The first row numbers, at most ``KEPT_ROWS``."""
    example: str
    """What it looks like in the first of them."""
    fix: str
    source: int = 0
    """Index of the source."""


class Tally:
    """Problems of one source, counted as they come."""

    def __init__(self, source: int = 0) -> None:
        self._source = source
        self._rows: dict[str, list[int]] = {}
        self._counts: dict[str, int] = {}
        self._examples: dict[str, str] = {}

    def add(self, kind: str, row: int, example: str = "") -> None:
        """One more row with this problem."""
        rows = self._rows.setdefault(kind, [])
        if len(rows) < KEPT_ROWS and (not rows or rows[-1] != row):
            rows.append(row)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        self._examples.setdefault(kind, shorten(example))

    def problems(self) -> list[DataProblem]:
        """All kinds met, errors first, the most frequent first."""
        found = [
            DataProblem(
                kind=kind,
                severity=CHECKS[kind].severity,
                title=CHECKS[kind].title,
                count=count,
                rows=tuple(self._rows[kind]),
                example=self._examples[kind],
                fix=CHECKS[kind].fix,
                source=self._source,
            )
            for kind, count in self._counts.items()
        ]
        return sorted(found, key=lambda p: (p.severity != "error", -p.count))


def shorten(text: str) -> str:
    """``text`` on one line, no longer than an example may be."""
    line = " ".join(text.split())
    return line if len(line) <= EXAMPLE_CHARACTERS else line[: EXAMPLE_CHARACTERS - 1] + "…"
