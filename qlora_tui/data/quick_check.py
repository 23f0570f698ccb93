"""Searches small files, and the start of large ones, for rows that would stop a run.

Used by ``qlora-tui train`` and the checks of the Train screen. The check needs no tokenizer. Problems that
show only in tokens, and problems in the rest of a large file, are found by ``dataset`` when the run starts,
or are known from an earlier inspection, whose errors are cached here. A cached error is valid for one state
of a file (its time and size) and one way of reading it; an error that shows only in tokens also depends on
tokenizer and template. The check also estimates the lengths of the samples.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.answer_cache import AnswerCache
from qlora_tui.data.conversation import Conversation, Message, RowRejectedError
from qlora_tui.data.problems import (
    BAD_ROWS,
    BYTES_PER_TOKEN,
    CHECKS,
    DataProblem,
    ProblemCounter,
    estimated_long_text,
    none_used,
    raise_first_error,
)
from qlora_tui.data.sources import SourceFile, conversations
from qlora_tui.recipe.preference_methods import PAIR_METHODS
from qlora_tui.recipe.schema import Data, Source

TIME_LIMIT_S = 2.0
_TEMPLATE_TOKENS = 5
"""Tokens that a chat template adds to each turn: the role, and start and end of the turn."""
_MARGIN = 1.25
"""A sample counts as too long if its estimated length is more than this many times the length limit."""


class FileSize(Struct, frozen=True):
    """The amount of data in one file, or in the part of it that was read."""

    source: int
    """Index of the source in the recipe."""
    rows: int
    """Number of rows, without excluded ones."""
    samples: int
    """Number of rows to train on, as far as can be known without a tokenizer."""
    lengths: array[int]
    """Estimated number of tokens in each sample, at most the length limit. A pair has two entries: the chosen
    side, then the rejected side.
    """
    excluded: int = 0
    """Number of rows that the source's ``excluded_rows`` leaves out."""
    left_out: int = 0
    """Number of rows that cannot give a sample, whatever the tokenizer, such as bad rows and rows without an
    answer.
    """


class QuickCheckResult(Struct, frozen=True):
    """The result of a check in which no row blocks a run."""

    complete: bool
    """Whether there was enough time for every row."""
    warnings: tuple[DataProblem, ...]
    """Warnings to show before a run, about the rows that were read."""
    sizes: tuple[FileSize, ...] = ()
    """Amount of data in each file that was read, in order."""
    problems: tuple[DataProblem, ...] = ()
    """All problems that were found, including those that are not in ``warnings``."""


def quick_check(
    files: Iterable[SourceFile],
    data: Data,
    time_limit_s: float = TIME_LIMIT_S,
) -> QuickCheckResult:
    """Check as many rows as can be read within ``time_limit_s`` seconds.

    Args:
        files: files of all sources; excluded rows neither count nor block.
        data: settings of the recipe.
        time_limit_s: seconds after which the rest is not read.

    Raises:
        UserError: a file has rows that block a run; the error is that of the first such file.
    """
    deadline = time.monotonic() + time_limit_s
    in_time = True
    warnings: list[DataProblem] = []
    every_problem: list[DataProblem] = []
    unused_files: list[DataProblem] = []
    sizes: list[FileSize] = []
    for file in files:
        tally = ProblemCounter(file.source, str(file.path), data)
        row_count = samples = excluded_count = rejected = 0
        lengths = array("I")
        for row, one in conversations(file):
            if row.number in file.excluded:
                excluded_count += 1
                continue
            row_count += 1
            for kind, example in row.warnings:
                tally.add(kind, row.number, example)
            if isinstance(one, RowRejectedError):
                tally.add(one.kind, row.number, one.reason)
                rejected += 1
            else:
                if _has_no_answer(one, data):
                    tally.add("no-answer", row.number, "No assistant turn is in the loss.")
                    rejected += 1
                if long_text := estimated_long_text(one, data):
                    tally.add_long_text(row.number, long_text)
                elif one.messages and one.messages[-1].role == "user":
                    tally.add("ends-with-user", row.number, "The last turn has no answer.")
                if not _is_left_out(one, data):
                    samples += 1
                    lengths.extend(_sample_lengths(one, data))
            if time.monotonic() >= deadline:
                in_time = False
                break
        sizes.append(FileSize(file.source, row_count, samples, lengths, excluded_count, rejected))
        problems = tally.problems()
        raise_first_error(problems)
        every_problem += problems
        shown = BAD_ROWS | {kind for kind, check in CHECKS.items() if check.is_shown_early}
        warnings += [problem for problem in problems if problem.kind in shown]
        if not in_time:
            break
        if row_count == rejected and (unused := none_used(row_count, problems)):
            unused_files.append(replace(unused, severity="warning"))
    if any(size.samples for size in sizes):  # otherwise all files together have the error
        warnings += unused_files
    return QuickCheckResult(in_time, tuple(warnings), tuple(sizes), tuple(every_problem))


def _has_no_answer(conversation: Conversation, data: Data) -> bool:
    return bool(conversation.messages) and data.train_on == "assistant" and not conversation.answers


def _is_left_out(conversation: Conversation, data: Data) -> bool:
    """Estimate whether a conversation has no answer to learn, or loses every answer to the length limit."""
    messages = conversation.messages
    if not messages:
        return False
    if _has_no_answer(conversation, data):
        return True
    limit = data.max_length * _MARGIN
    if data.overflow == "drop":
        return _estimated_tokens("", messages) > limit
    if data.overflow != "cut-right" or data.train_on != "assistant":
        return False
    before_answer = takewhile(lambda m: m.role != "assistant" or not m.train, messages)
    return _estimated_tokens("", tuple(before_answer)) > limit


def _estimated_tokens(text: str, messages: Sequence[Message]) -> int:
    texts = [text, *(message.content + message.reasoning for message in messages)]
    text_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return text_bytes // BYTES_PER_TOKEN + _TEMPLATE_TOKENS * len(messages) + 1


def _sample_lengths(conversation: Conversation, data: Data) -> list[int]:
    """Estimate the number of tokens in each sample of a conversation, after it was cut or split at the length
    limit.
    """
    limit = data.max_length
    lengths = [_estimated_tokens(side.text, side.messages) for side in (conversation, *conversation.rejected)]
    if data.preferences in PAIR_METHODS:
        chosen, *rejected = (min(length, limit) for length in lengths)
        return [length for other in rejected for length in (chosen, other)]
    if data.overflow != "split":
        return [min(length, limit) for length in lengths]
    return [min(limit, length - start) for length in lengths for start in range(0, length, limit)]


_TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "chat_template*",
    "*/tool_use.jinja",
)
_MAX_FILES = 1000
_READING = 4
"""Version of the row checks. It is increased when rows that used to be errors become readable, so that errors
cached earlier no longer apply.
"""

_cache = AnswerCache("findings", DataProblem, max_bytes=1 << 20)

Tokens = tuple[object, ...]
"""Inputs on which errors in tokens depend; see ``tokenizer_fingerprint``."""


def tokenizer_fingerprint(folder: Path, template: str, train_on: str) -> Tokens:
    """Return what determines a row's tokens: the folder of the tokenizer, the names, modification times and
    sizes of its files, and the recipe's ``model.chat_template`` and ``data.train_on``.
    """
    files = sorted(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern))
    stamps = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return (str(folder.resolve()), stamps, template, train_on)


Stamp = tuple[int, int]
"""Modification time and size of a file."""


def file_fingerprint(path: Path) -> Stamp:
    """Return the current state of a file.

    Call this before reading the file, because it may change while it is being read.
    """
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def cache_errors(
    source: Source,
    path: Path,
    stamp: Stamp,
    problems: Iterable[DataProblem],
    tokens: Tokens | None,
    *,
    read: bool,
    skips_bad_rows: bool = False,
) -> None:
    """Store a file's first error that shows only in tokens, and its first other error.

    Without ``tokens``, errors that show only in tokens are ignored. If the whole file was ``read``, cached
    errors that no longer occur are removed.
    """
    errors = [problem for problem in problems if problem.severity == "error" and problem.path == str(path)]
    for of_tokens in (False, True):
        if of_tokens and tokens is None:
            continue
        first_error = next((e for e in errors if CHECKS[e.kind].is_of_tokens == of_tokens), None)
        key = _key(source, path, stamp, tokens if of_tokens else None, skips_bad_rows=skips_bad_rows)
        if first_error is not None:
            _cache.keep(key, first_error, _MAX_FILES)
        elif read:
            _cache.forget(key)


def raise_cached_error(
    files: Sequence[tuple[Source, Path]], tokens: Tokens | None = None, *, skips_bad_rows: bool = False
) -> None:
    """Raise ``UserError`` for the first file with a cached error."""
    for source, path in files:
        for one in dict.fromkeys((None, tokens)):
            with suppress(OSError):
                key = _key(source, path, file_fingerprint(path), one, skips_bad_rows=skips_bad_rows)
                raise_first_error(filter(None, [_cache.find(key)]))


def _key(source: Source, path: Path, stamp: Stamp, tokens: Tokens | None, *, skips_bad_rows: bool) -> bytes:
    what = (
        _READING,
        str(path.resolve()),
        *stamp,
        source.format,
        source.columns,
        tokens,
        skips_bad_rows,
        source.excluded_rows,
    )
    # In names that are not UTF-8, bytes become surrogates.
    return repr(what).encode(errors="surrogateescape")
