"""Plain texts longer than a row, counted over a file: what is lost of them, and what a split would keep."""

from __future__ import annotations

from qlora_tui.data.conversation import Conversation
from qlora_tui.data.problems import CHECKS, KEPT_ROWS, DataProblem
from qlora_tui.recipe.schema import Data

_LOSES = {"cut-left": "keeps the last", "cut-right": "keeps the first", "drop": "keeps"}


_MOST_CHARACTERS_A_TOKEN = 10
"""Prose has about four; a text with more than this many is surely over the limit."""


def surely_long(conversation: Conversation, data: Data) -> bool:
    """Whether a plain text is over the length limit with any tokenizer, and not split."""
    most = data.max_length * _MOST_CHARACTERS_A_TOKEN
    return len(conversation.text) > most and data.too_long != "split"


class LongTexts:
    """Those of one file."""

    def __init__(self, source: int, path: str) -> None:
        self._source = source
        self._path = path
        self._rows: list[int] = []
        self._count = 0
        self._length = self._kept = self._split_rows = 0

    def __len__(self) -> int:
        return self._count

    def add(self, row: int, long_text: tuple[int, int, int]) -> None:
        """One more; see ``Outcome.long_text``."""
        if len(self._rows) < KEPT_ROWS:
            self._rows.append(row)
        self._count += 1
        length, kept, split_rows = long_text
        self._length += length
        self._kept += kept
        self._split_rows += split_rows

    def problem(self, data: Data) -> DataProblem:
        """What ``data.too_long`` does to them, and the number of rows that splitting makes of them."""
        texts = "One text" if self._count == 1 else f"{self._count:,} texts"
        if self._split_rows:
            rows = "1 row" if self._split_rows == 1 else f"{self._split_rows:,} rows"
            example = (
                f'data.too_long = "{data.too_long}" {_LOSES[data.too_long]} {self._kept:,} of '
                f"{self._length:,} tokens; splitting makes {rows} of them."
            )
        else:
            hold = "holds" if self._count == 1 else "hold"
            example = (
                f"{texts} {hold} {self._length:,} characters, more than {data.max_length:,} tokens can hold. "
                "With a model, `data inspect` and the Data screen say how many rows splitting makes."
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
        )
