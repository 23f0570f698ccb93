"""A search for rows that would stop a run, before it is queued: all of a small file, or a large one's start.

Used by ``qlora-tui train`` and the checks of the Train screen. It needs no tokenizer. Problems that show only
in tokens, and those in the rest of a large file, are found by ``dataset`` when the run starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from msgspec import Struct

from qlora_tui.data.conversation import Conversation, RowRejectedError
from qlora_tui.data.long_texts import BYTES_PER_TOKEN, LongTexts, estimated_long_text
from qlora_tui.data.problems import DataProblem, ProblemCounter, raise_first_error
from qlora_tui.data.sources import SourceFile, conversations
from qlora_tui.recipe.schema import Data

TIME_LIMIT_S = 2.0
_TEMPLATE_TOKENS = 5
"""Tokens that a chat template adds around each turn: role, and the start and end of the turn."""
_SHOWN_BEFORE_RUN = ("rated-bad", "same-answers", "long-text", "ends-with-user")
"""Warnings on rows that are left out or cut, also shown before a run."""


class FileSize(Struct, frozen=True):
    """Amount of data in one file, or in the part of it that was read."""

    source: int
    """Index of the source in the recipe."""
    samples: int
    tokens: int
    """An estimate, with each sample cut to the length of a row."""


class QuickCheckResult(Struct, frozen=True):
    """Result of a check in which no row blocks a run."""

    complete: bool
    """Whether there was time for every row."""
    warnings: tuple[DataProblem, ...]
    """Warnings of the kinds in ``_SHOWN_BEFORE_RUN``, on the rows that were read."""
    sizes: tuple[FileSize, ...] = ()
    """Data of each file that was reached, in order."""


def quick_check(
    files: Iterable[SourceFile], data: Data, time_limit_s: float = TIME_LIMIT_S
) -> QuickCheckResult:
    """Check as many rows as can be read within ``time_limit_s`` seconds.

    Raises ``UserError`` for the first file with rows that block a run.
    """
    deadline = time.monotonic() + time_limit_s
    warnings: list[DataProblem] = []
    sizes: list[FileSize] = []
    for file in files:
        tally, long_texts = (
            ProblemCounter(file.source, str(file.path)),
            LongTexts(file.source, str(file.path)),
        )
        in_time = True
        samples = tokens = 0
        for row, one in conversations(file):
            if isinstance(one, RowRejectedError):
                tally.add(one.kind, row.number, one.reason)
            elif long_text := estimated_long_text(one, data):
                long_texts.add(row.number, long_text)
            elif one.messages and one.messages[-1].role == "user":
                tally.add("ends-with-user", row.number, "The last turn has no answer.")
            if not isinstance(one, RowRejectedError):
                samples += 1
                tokens += _trained_length(one, data)
            if time.monotonic() >= deadline:
                in_time = False
                break
        sizes.append(FileSize(file.source, samples, tokens))
        problems = tally.problems()
        raise_first_error(problems)
        warnings += [problem for problem in problems if problem.kind in _SHOWN_BEFORE_RUN]
        warnings += [long_texts.problem(data)] if len(long_texts) else []
        if not in_time:
            return QuickCheckResult(False, tuple(warnings), tuple(sizes))
    return QuickCheckResult(True, tuple(warnings), tuple(sizes))


def _trained_length(conversation: Conversation, data: Data) -> int:
    """Estimate the tokens of a sample that fit in a row; all of them where long samples are split."""
    texts = [conversation.text, *(message.content + message.reasoning for message in conversation.messages)]
    text_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    length = text_bytes // BYTES_PER_TOKEN + _TEMPLATE_TOKENS * len(conversation.messages) + 1
    return length if data.overflow == "split" else min(length, data.max_length)
