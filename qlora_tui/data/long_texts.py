"""Plain texts longer than a row, counted over a file: what is lost of them, and what a split would keep."""

from __future__ import annotations

import math

from msgspec import Struct

from qlora_tui.data.conversation import Conversation
from qlora_tui.data.problems import CHECKS, MAX_LISTED_ROWS, DataProblem
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.schema import Data

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


class LongTexts:
    """Long plain texts of one file."""

    def __init__(self, source: int, path: str) -> None:
        self._source = source
        self._path = path
        self._rows: list[int] = []
        self._count = 0
        self._length = self._kept = self._split_rows = 0
        self._estimated = False

    def __len__(self) -> int:
        return self._count

    def add(self, row: int, long_text: LongText) -> None:
        """Count one more long text."""
        if len(self._rows) < MAX_LISTED_ROWS:
            self._rows.append(row)
        self._count += 1
        self._length += long_text.length
        self._split_rows += long_text.split_rows
        self._kept += long_text.remaining or 0
        self._estimated |= long_text.remaining is None

    def problem(self, data: Data) -> DataProblem:
        """Describe what ``data.overflow`` does to long texts, with the rows that splitting gives."""
        rows = pluralize(self._split_rows, "row")
        if self._estimated:
            texts = "One text holds" if self._count == 1 else f"{self._count:,} texts hold"
            example = (
                f"{texts} {self._length:,} characters, more than {data.max_length:,} tokens can hold; "
                f"splitting makes about {rows} of them (an estimate: {BYTES_PER_TOKEN} bytes a token)."
            )
        else:
            example = (
                f'data.overflow = "{data.overflow}" {_LOSES[data.overflow]} {self._kept:,} of '
                f"{self._length:,} tokens; splitting makes {rows} of them."
            )
        check = CHECKS["long-text"]
        return DataProblem(
            kind="long-text",
            severity=check.severity,
            title=check.title,
            count=self._count,
            rows=tuple(self._rows),
            example=example,
            fix=check.fix,
            source=self._source,
            path=self._path,
            split_rows=self._split_rows,
            is_estimate=self._estimated,
        )
