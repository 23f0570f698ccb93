"""The kinds of data problems, and counters of their rows.

``CHECKS`` declares each kind once: severity, meaning and fix. ``ProblemCounter`` counts them while rows
stream by, keeping the first row numbers and one example of each; of plain texts longer than a row it counts
what is lost of them, and what a split would keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.data.conversation import Conversation
from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.schema import Data

MAX_LISTED_ROWS = 1000
"""Most row numbers stored for each kind; further rows are only counted."""
EXAMPLE_CHARACTERS = 200


class CheckSpec(Struct, frozen=True):
    """Declaration of one kind of problem."""

    severity: Literal["error", "warning"]
    """Whether the problem blocks a run (``error``) or not (``warning``)."""
    title: str
    fix: str
    is_left_out: bool = False
    """Whether a row with this problem is left out. The rows of other warnings are used."""
    says_outcome: bool = False
    """Whether the title says what becomes of the row."""


CHECKS: dict[str, CheckSpec] = {
    "bad-json": CheckSpec(
        "error",
        "Not valid JSON",
        "Correct or remove the line; a download that was cut off is the usual cause.",
    ),
    "bad-encoding": CheckSpec("error", "Not UTF-8", "Convert the file: iconv -f LATIN1 -t UTF-8 OLD > NEW."),
    "bad-row": CheckSpec("error", "Not a row", "A row is an object with named fields and a value for each."),
    "rows-in-value": CheckSpec(
        "warning",
        "Rows inside one value",
        "A quote may be open by mistake: look at these lines. A quote inside a value is written twice: "
        '"a 5"" screen".',
    ),
    "repeated-key": CheckSpec(
        "warning", "A key comes twice", "Only the last of its values is read. Rename or remove the others."
    ),
    "wrong-format": CheckSpec(
        "error",
        "Not in the format of the rest",
        "A file has one format. Correct these rows, or move them to another file.",
    ),
    "unsupported-part": CheckSpec(
        "error", "Part that is not text", "Remove the part from the row: only text can be trained on."
    ),
    "media": CheckSpec(
        "error",
        "Images, video or audio",
        "Only text can be trained on. Leave these rows out, or describe the media in words and remove the "
        "column or placeholder.",
    ),
    "unknown-role": CheckSpec("error", "Unknown role", "Roles are system, user, assistant and tool."),
    "turn-end-untrained": CheckSpec(
        "error",
        "The end of the answer is not learned",
        'The model would never stop. Choose another template: model.chat_template = "chatml".',
    ),
    "pad-hides-end": CheckSpec(
        "error",
        "The end token is also the pad token, and is not learned",
        'The model would never stop. Choose another template: model.chat_template = "chatml".',
    ),
    "untrained-tokens": CheckSpec(
        "warning",
        "The base model has never learned these tokens",
        'Or use a template without them: model.chat_template = "alpaca" or "plain".',
    ),
    "template-refuses": CheckSpec(
        "warning",
        "The chat template refuses the row",
        "The row is left out. Reorder or merge its turns as the message asks.",
        is_left_out=True,
    ),
    "too-large": CheckSpec(
        "warning",
        "Too long to be made into tokens",
        "The row is left out. Split it into shorter ones.",
        is_left_out=True,
    ),
    "empty-row": CheckSpec(
        "warning",
        "Empty row",
        "Nothing to learn: the row is left out. Remove it from the file.",
        is_left_out=True,
    ),
    "rated-bad": CheckSpec(
        "warning",
        "Left out: not rated good",
        'data.preferences = "chosen" trains on answers that are rated good only.',
        is_left_out=True,
        says_outcome=True,
    ),
    "same-answers": CheckSpec(
        "warning",
        "Left out: the chosen answer is also the rejected one",
        "The row prefers neither. Remove it from the file.",
        is_left_out=True,
        says_outcome=True,
    ),
    "ends-with-user": CheckSpec(
        "warning",
        "The last turn is the user's",
        "The turn has no answer to learn. Add the answer, or remove the turn.",
    ),
    "long-text": CheckSpec(
        "warning",
        "Long text",
        'To train on all of it, set data.overflow = "split" (on the command line: '
        "--set data.overflow=split).",
    ),
    "no-answer": CheckSpec(
        "warning",
        "No answer to learn",
        "The row has no assistant turn in the loss and is left out.",
        is_left_out=True,
    ),
    "role-order": CheckSpec(
        "warning", "Roles out of order", "Turns should alternate, user first. The row is used as it is."
    ),
    "empty-answer": CheckSpec(
        "warning", "Empty answer", "The model would learn to answer nothing. Remove the turn."
    ),
    "everything-trained": CheckSpec(
        "warning", "The whole row is in the loss", "There is no prompt before the answer; add one."
    ),
    "nothing-left": CheckSpec(
        "warning",
        "Nothing to learn within the length limit",
        "The answer is beyond the cut, so the row is skipped. Raise Sequence length (data.max_length).",
        is_left_out=True,
    ),
    "too-long": CheckSpec(
        "warning",
        "Longer than the length limit",
        "Dropped, cut or split, as Overflow (data.overflow) says. Raise Sequence length (data.max_length) to "
        "keep the row whole.",
    ),
    "beyond-context": CheckSpec(
        "warning",
        "Longer than the model's context",
        "Set data.max_length to the model's context or less, or choose a model with a longer one.",
    ),
    "none-used": CheckSpec(
        "error",
        "No row can be trained on",
        "Correct the rows, or choose another file.",
    ),
    "one-row": CheckSpec(
        "warning",
        "Only one row",
        "If the file has more rows, they are inside one object or line: write one per line, as JSONL.",
    ),
    "double-bos": CheckSpec(
        "warning",
        "Starts with two BOS tokens",
        "The chat template adds one too many. Choose another with model.chat_template.",
    ),
    "control-tokens": CheckSpec(
        "warning",
        "Control tokens inside a text",
        "They are learned as ordinary text, so nothing breaks. Remove them if they are there by mistake.",
    ),
    "answer-changed": CheckSpec(
        "warning",
        "The template changes the answer",
        "What is learned differs from the file: look at the row. Another template may keep it whole.",
    ),
    "duplicate": CheckSpec(
        "warning", "Duplicate row", "It counts twice. Remove it, unless that is intended."
    ),
    "near-duplicate": CheckSpec(
        "warning", "Nearly the same as an earlier row", "Near-identical rows teach little. Remove it."
    ),
    "overlap": CheckSpec(
        "warning",
        "In the validation file too",
        "The validation loss will look too good. Remove the row from one of the two.",
    ),
    "encoding-damage": CheckSpec(
        "warning", "Damaged characters", "The file was once decoded wrongly; find an undamaged copy."
    ),
    "secret": CheckSpec(
        "warning", "Looks like a secret key", "The model may learn to repeat it. Remove and revoke it."
    ),
}
"""Every kind of problem."""

BAD_ROWS = frozenset(
    ("bad-json", "bad-encoding", "bad-row", "wrong-format", "unsupported-part", "media", "unknown-role")
)
"""Errors of single rows, which ``data.bad_rows = "skip"`` leaves out."""

OVERFLOW_OUTCOMES = {
    "drop": "left out",
    "cut-left": "cut left",
    "cut-right": "cut right",
    "split": "split",
}
"""What becomes of a row that is too long, by ``data.overflow``."""

NOTES: dict[str, str] = {
    "system-in-user": "The template has no system role: the system prompt is put before the first question.",
    "tools-as-text": "The template cannot describe tools: they are described in the system prompt.",
    "calls-as-text": "The template has no tool calls: they are written into the answer.",
    "tool-as-user": "The template has no tool role: what tools answer is given as a user turn.",
    "control-tokens": "Control tokens inside a text are learned as ordinary text.",
    "answer-changed": "The template changes the answer's text.",
    "weights": "Answers count in the loss as the weights in the file say.",
    "reasoning-present": "The row has reasoning.",
    "reasoning-learned": "Reasoning is learned.",
    "reasoning-read": "Reasoning is only read.",
    "reasoning-left-out": "Reasoning is left out: data.thinking is off.",
    "reasoning-split": "The template drops reasoning from earlier turns: each gets its own sample.",
    "thinking-on": "Rendered with thinking on.",
    "thinking-off": "Rendered with thinking off; an empty thought in the prompt is only read.",
    "thought-closed": "The template's prompt opens a thought: it is closed at once, and that is learned.",
}
"""Descriptions of what was changed for the template: the notes of a report and of a sample."""


ON_THINKING = frozenset(kind for kind in NOTES if kind.startswith(("reasoning-", "thinking-", "thought-")))
"""Notes that ``dataset_report`` turns into sentences on the data as a whole."""


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
    """Index of the recipe's source."""
    path: str = ""
    """File that the rows are in."""
    tokens: tuple[str, ...] = ()
    """Tokens to set in ``lora.trainable_tokens``, where that fixes it."""
    split_rows: int = 0
    """Rows that ``data.overflow = "split"`` makes of these, where that fixes the problem."""
    is_estimate: bool = False
    """Whether ``split_rows`` is an estimate, because there is no tokenizer."""


def check_of(kind: str, *, skips_bad_rows: bool) -> CheckSpec:
    """Return the declaration of a kind, as a warning where the recipe leaves such rows out."""
    check = CHECKS[kind]
    if kind not in BAD_ROWS:
        return check
    if skips_bad_rows:
        return CheckSpec("warning", check.title, "The row is left out.", is_left_out=True)
    return CheckSpec(
        check.severity, check.title, f'{check.fix} Or leave such rows out: data.bad_rows = "skip".'
    )


def row_outcome(problem: DataProblem, data: Data) -> str:
    """Return what becomes of rows with a problem, such as ``, left out``; empty where the title says it."""
    if problem.kind in CHECKS and CHECKS[problem.kind].says_outcome:
        return ""
    if problem.severity == "error":
        return ", run blocked"
    if problem.kind in ("too-long", "long-text"):
        return f", {OVERFLOW_OUTCOMES[data.overflow]}"
    skips = data.bad_rows == "skip"
    return ", left out" if check_of(problem.kind, skips_bad_rows=skips).is_left_out else ", used"


def is_bad_row(problem: DataProblem) -> bool:
    """Return whether the problem blocks a run that could go on without its rows."""
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
    """Build a problem as its kind is declared; ``facts`` are other fields, or replace what is declared."""
    check = check_of(kind, skips_bad_rows=skips_bad_rows)
    declared = {"severity": check.severity, "title": check.title, "fix": check.fix}
    return DataProblem(kind=kind, count=count, rows=tuple(rows), example=example, **declared | facts)


def none_used(rows: int, problems: Sequence[DataProblem]) -> DataProblem | None:
    """Build the error for ``rows`` rows that are all left out; None if their ``problems`` do not say why."""
    reasons = [problem for problem in problems if problem.kind in CHECKS and is_left_out(problem)]
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
    """Build the error for a problem that blocks a run, with its kind as the code.

    An error without rows is one of a whole file, which its text names.
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
    """Return ``text`` on one line, cut to the length of an example."""
    line = " ".join(text.split())
    return line if len(line) <= EXAMPLE_CHARACTERS else line[: EXAMPLE_CHARACTERS - 1] + "…"


_LOSES = {"cut-left": "keeps the last", "cut-right": "keeps the first", "drop": "keeps"}

_MAX_CHARACTERS_PER_TOKEN = 10
"""A text with more than this many for each token of the limit is over it with any tokenizer."""
BYTES_PER_TOKEN = 4
"""Rough UTF-8 bytes of a token. Measured with the tokenizers of SmolLM2 and Gemma 3: 4.8 and 4.9 in English
Wikipedia, 3.6 in Markdown with links, 1.8 and 4.2 in Chinese."""


class LongText(Struct, frozen=True, array_like=True):
    """A plain text over the length limit that is not split."""

    length: int
    """Length in tokens; in characters without a tokenizer."""
    split_rows: int
    """Rows that splitting gives; an estimate without a tokenizer."""
    remaining: int | None = None
    """Tokens that remain; None without a tokenizer."""


def max_characters(data: Data) -> int:
    """Return the number of characters above which a text is over the length limit with any tokenizer."""
    return data.max_length * _MAX_CHARACTERS_PER_TOKEN


def estimated_long_text(conversation: Conversation, data: Data) -> LongText | None:
    """Estimate the length of a plain text that is certain to be cut or dropped, without a tokenizer."""
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
    """The first ones."""
    last_row: int | None = None


class ProblemCounter:
    """Counts the problems of one file."""

    def __init__(self, source: int = 0, path: str = "", data: Data | None = None) -> None:
        """``data`` says what becomes of bad rows and of long texts."""
        self._place: dict[str, Any] = {"source": source, "path": path}
        self._data = data or Data()
        self._tallies: dict[str, _Tally] = {}
        self._long = LongText(0, 0, 0)
        """Sum over all long texts."""

    def add(self, kind: str, row: int, example: str = "") -> None:
        """Count one more row with this problem, once however often it has it. Rows come in order."""
        tally = self._tallies.setdefault(kind, _Tally(shorten(example)))
        if tally.last_row == row:
            return
        tally.last_row = row
        tally.count += 1
        if len(tally.rows) < MAX_LISTED_ROWS:
            tally.rows.append(row)

    def add_long_text(self, row: int, text: LongText) -> None:
        """Count one more plain text over the length limit."""
        self.add("long-text", row)
        so_far, left = self._long, text.remaining
        remaining = None if so_far.remaining is None or left is None else so_far.remaining + left
        self._long = LongText(so_far.length + text.length, so_far.split_rows + text.split_rows, remaining)

    def problems(self) -> list[DataProblem]:
        """Return all kinds of problems, errors first, then by descending number of rows."""
        skips = self._data.bad_rows == "skip"
        problems = [
            problem_of(kind, tally.count, tally.rows, tally.example, skips_bad_rows=skips, **self._place)
            for kind, tally in self._tallies.items()
        ]
        problems = [self._on_long_texts(one) if one.kind == "long-text" else one for one in problems]
        return sorted(problems, key=lambda p: (p.severity != "error", -p.count))

    def _on_long_texts(self, problem: DataProblem) -> DataProblem:
        """Add what ``data.overflow`` does to long texts, with the rows that splitting gives."""
        long, data = self._long, self._data
        rows = pluralize(long.split_rows, "row")
        if long.remaining is None:
            texts = "One text holds" if problem.count == 1 else f"{problem.count:,} texts hold"
            example = (
                f"{texts} {long.length:,} characters, more than {data.max_length:,} tokens can hold; "
                f"splitting makes about {rows} of them (an estimate: {BYTES_PER_TOKEN} bytes a token)."
            )
        else:
            example = (
                f'data.overflow = "{data.overflow}" {_LOSES[data.overflow]} {long.remaining:,} of '
                f"{long.length:,} tokens; splitting makes {rows} of them."
            )
        estimated = long.remaining is None
        return replace(problem, example=example, split_rows=long.split_rows, is_estimate=estimated)
