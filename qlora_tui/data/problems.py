"""The kinds of data problems, and counters of their rows.

``problems.toml`` declares each kind once: severity, meaning and fix. ``ProblemCounter`` counts the problems
while rows stream by, and keeps the first row numbers and one example of each kind. For plain texts that are
too long, it also adds up all tokens, the tokens that are kept, and the rows that splitting would give.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.data.conversation import Conversation
from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.schema import Data

MAX_LISTED_ROWS = 1000
"""Maximum number of row numbers stored for each kind; further rows are only counted."""
EXAMPLE_CHARACTERS = 200


class CheckSpec(Struct, frozen=True):
    """Declaration of one kind of problem. The comment at the top of ``problems.toml`` explains the fields."""

    severity: Literal["error", "warning"]
    """Whether the problem blocks a run (``error``) or not (``warning``)."""
    title: str
    fix: str
    is_left_out: bool = False
    says_outcome: bool = False
    can_be_skipped: bool = False
    is_shown_early: bool = False
    is_of_tokens: bool = False


class _Declared(Struct, frozen=True):
    checks: dict[str, CheckSpec]
    notes: dict[str, str]


_DECLARED = msgspec.toml.decode(Path(__file__).with_suffix(".toml").read_bytes(), type=_Declared)
CHECKS, NOTES = _DECLARED.checks, _DECLARED.notes
"""``CHECKS``: the declaration of each kind of problem. ``NOTES``: the sentence for each note of a report or a
sample, such as a change made for the template.
"""

BAD_ROWS = frozenset(kind for kind, check in CHECKS.items() if check.can_be_skipped)
"""Kinds of errors in single rows. With ``data.bad_rows = "skip"``, rows with such an error are left out."""

OVERFLOW_OUTCOMES = {
    "drop": "left out",
    "cut-left": "cut left",
    "cut-right": "cut right",
    "split": "split",
}
"""What happens to a row that is too long, keyed by ``data.overflow``."""

ON_THINKING = frozenset(kind for kind in NOTES if kind.startswith(("reasoning-", "thinking-", "thought-")))
"""Notes that ``dataset_report`` combines into sentences about the whole dataset."""


class DataProblem(Struct, frozen=True):
    """One kind of problem in one file."""

    kind: str
    severity: Literal["error", "warning"]
    title: str
    count: int
    rows: tuple[int, ...]
    """The first row numbers, at most ``MAX_LISTED_ROWS``."""
    example: str
    """Example from the first of these rows."""
    fix: str
    source: int = 0
    """Index of the source in the recipe."""
    path: str = ""
    """File that the rows are in."""
    tokens: tuple[str, ...] = ()
    """Tokens to add to ``lora.trainable_tokens``, if that fixes the problem."""
    split_rows: int = 0
    """Number of rows into which ``data.overflow = "split"`` splits these rows, if that fixes the problem."""
    is_estimate: bool = False
    """Whether ``split_rows`` is an estimate, because there is no tokenizer."""


def check_of(kind: str, *, skips_bad_rows: bool) -> CheckSpec:
    """Return the declaration of a kind of problem.

    An error of single rows becomes a warning if ``skips_bad_rows`` is true. Otherwise its fix also names the
    setting that leaves such rows out.
    """
    check = CHECKS[kind]
    if kind not in BAD_ROWS:
        return check
    if skips_bad_rows:
        return CheckSpec("warning", check.title, "The row is left out.", is_left_out=True)
    return CheckSpec(
        check.severity, check.title, f'{check.fix} Or leave such rows out: data.bad_rows = "skip".'
    )


def row_outcome(problem: DataProblem, data: Data) -> str:
    """Return what happens to rows with a problem, such as ``, left out``; empty if the title says it."""
    if CHECKS[problem.kind].says_outcome:
        return ""
    if problem.severity == "error":
        return ", run blocked"
    if problem.kind in ("too-long", "long-text"):
        return f", {OVERFLOW_OUTCOMES[data.overflow]}"
    skips = data.bad_rows == "skip"
    return ", left out" if check_of(problem.kind, skips_bad_rows=skips).is_left_out else ", used"


def is_bad_row(problem: DataProblem) -> bool:
    """Return whether the problem blocks a run that could continue without the rows."""
    return problem.severity == "error" and problem.kind in BAD_ROWS


def problem_of(
    kind: str,
    count: int,
    rows: Sequence[int],
    example: str,
    *,
    skips_bad_rows: bool = False,
    **facts: Any,
) -> DataProblem:
    """Build a problem of a declared kind. ``facts``: values of other fields of ``DataProblem``, or of fields
    whose declared values they replace.
    """
    check = check_of(kind, skips_bad_rows=skips_bad_rows)
    declared = {"severity": check.severity, "title": check.title, "fix": check.fix}
    return DataProblem(kind=kind, count=count, rows=tuple(rows), example=example, **declared | facts)


def none_used(rows: int, problems: Sequence[DataProblem]) -> DataProblem | None:
    """Build the error for ``rows`` rows that are all left out; None if ``problems`` do not explain it."""
    reasons = [problem for problem in problems if is_left_out(problem)]
    if not reasons:
        return None
    most = max(reasons, key=lambda problem: problem.count)
    example = f"All {rows:,} are left out. {most.title}, {pluralize(most.count, 'row')}: {most.example}"
    check = CHECKS["none-used"]
    return replace(most, kind="none-used", severity="error", title=check.title, count=rows, example=example)


def is_left_out(problem: DataProblem) -> bool:
    """Return whether the rows of a warning are left out."""
    return problem.severity == "warning" and (problem.kind in BAD_ROWS or CHECKS[problem.kind].is_left_out)


def raise_first_error(problems: Iterable[DataProblem]) -> None:
    """Raise ``UserError`` for the first problem that blocks a run."""
    for problem in problems:
        if problem.severity == "error":
            raise error_of(problem)


def error_of(problem: DataProblem) -> UserError:
    """Build the error for a problem that blocks a run.

    The error code is the kind of the problem. A problem without rows concerns a whole file: its example names
    the file, and the error has no code.
    """
    if not problem.rows:
        return UserError(problem.title, what=problem.example, fix=problem.fix)
    rows = ", ".join(map(str, problem.rows[:5])) + (" and others" if problem.count > 5 else "")
    word = "rows" if len(problem.rows) > 1 else "row"
    return UserError(
        problem.title,
        what=f"{problem.path}, {word} {rows}: {problem.example}",
        why=f"{problem.count:,} rows of the file have this problem." if problem.count > 1 else "",
        fix=problem.fix,
        code=problem.kind,
    )


def shorten(text: str) -> str:
    """Return ``text`` on one line, cut to :data:`EXAMPLE_CHARACTERS`."""
    line = " ".join(text.split())
    return line if len(line) <= EXAMPLE_CHARACTERS else line[: EXAMPLE_CHARACTERS - 1] + "…"


_LOSES = {"cut-left": "keeps the last", "cut-right": "keeps the first", "drop": "keeps"}

_MAX_CHARACTERS_PER_TOKEN = 10
"""Assumed maximum number of characters per token. A text with more than ``data.max_length`` times this many
characters is therefore too long for every tokenizer.
"""
BYTES_PER_TOKEN = 4
"""Approximate number of UTF-8 bytes in a token.

Measured with the tokenizers of SmolLM2 and Gemma 3: 4.8 and 4.9 in English Wikipedia, 3.6 in Markdown with
links, 1.8 and 4.2 in Chinese.
"""


class LongText(Struct, frozen=True, array_like=True):
    """The size of a plain text that exceeds the length limit and is not split."""

    length: int
    """Length in tokens or, if there is no tokenizer, in characters."""
    split_rows: int
    """Number of rows that splitting would give; an estimate if there is no tokenizer."""
    remaining: int | None = None
    """Tokens that are kept; None without a tokenizer."""


def max_characters(data: Data) -> int:
    """Return the number of characters above which a text is too long, whatever the tokenizer."""
    return data.max_length * _MAX_CHARACTERS_PER_TOKEN


def estimated_long_text(conversation: Conversation, data: Data) -> LongText | None:
    """Measure, without a tokenizer, a plain text that is certain to be cut or dropped; return None for any
    other conversation. The length is in characters, and the number of rows is an estimate.
    """
    text = conversation.text
    if data.overflow == "split" or len(text) <= max_characters(data):
        return None
    tokens = len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN
    return LongText(len(text), math.ceil(tokens / data.max_length))


class _Tally(Struct):
    """Rows with one kind of problem."""

    example: str
    count: int = 0
    rows: list[int] = []
    """Numbers of the first rows that have the problem."""
    last_row: int | None = None


class ProblemCounter:
    """Counts the problems of one file."""

    def __init__(self, source: int = 0, path: str = "", data: Data | None = None) -> None:
        """Prepare to count the problems of one file. ``data``: settings for bad rows and long texts."""
        self._place: dict[str, Any] = {"source": source, "path": path}
        self._data = data or Data()
        self._tallies: dict[str, _Tally] = {}
        self._long = LongText(0, 0, 0)
        """Sum over all long texts."""

    def add(self, kind: str, row: int, example: str = "") -> None:
        """Count another row with this problem, only once even if the row has it several times.

        Rows must be added in order.
        """
        tally = self._tallies.setdefault(kind, _Tally(shorten(example)))
        if tally.last_row == row:
            return
        tally.last_row = row
        tally.count += 1
        if len(tally.rows) < MAX_LISTED_ROWS:
            tally.rows.append(row)

    def add_long_text(self, row: int, text: LongText) -> None:
        """Count another plain text over the length limit."""
        self.add("long-text", row)
        so_far, left = self._long, text.remaining
        remaining = None if so_far.remaining is None or left is None else so_far.remaining + left
        self._long = LongText(so_far.length + text.length, so_far.split_rows + text.split_rows, remaining)

    def problems(self) -> list[DataProblem]:
        """Return one problem for each kind found: errors first, then by descending number of rows."""
        skips = self._data.bad_rows == "skip"
        problems = [
            problem_of(kind, tally.count, tally.rows, tally.example, skips_bad_rows=skips, **self._place)
            for kind, tally in self._tallies.items()
        ]
        problems = [self._on_long_texts(one) if one.kind == "long-text" else one for one in problems]
        return sorted(problems, key=lambda p: (p.severity != "error", -p.count))

    def _on_long_texts(self, problem: DataProblem) -> DataProblem:
        """Return the problem with the size of the long texts as its example, and with the number of rows that
        splitting would give.
        """
        long, data = self._long, self._data
        rows = pluralize(long.split_rows, "row")
        if long.remaining is None:
            texts = "One text holds" if problem.count == 1 else f"{problem.count:,} texts hold"
            example = (
                f"{texts} {long.length:,} characters, more than {data.max_length:,} tokens can hold; "
                f"splitting gives about {rows} (estimated at {BYTES_PER_TOKEN} bytes per token)."
            )
        else:
            example = (
                f'data.overflow = "{data.overflow}" {_LOSES[data.overflow]} {long.remaining:,} of '
                f"{long.length:,} tokens; splitting gives {rows}."
            )
        estimated = long.remaining is None
        return replace(problem, example=example, split_rows=long.split_rows, is_estimate=estimated)
