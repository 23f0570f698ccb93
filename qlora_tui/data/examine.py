"""Rows looked at a batch at a time: rendered, fitted, checked and counted.

``dataset`` writes what comes out, ``inspect`` measures it; so the two never disagree on what a run
would train on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from msgspec import Struct

from qlora_tui.data.checks import conversation_findings
from qlora_tui.data.conversation import Conversation, RowRefused
from qlora_tui.data.lengths import fit
from qlora_tui.data.problems import DataProblem, Tally
from qlora_tui.data.render import Rendered, render_many
from qlora_tui.data.row import Row
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.schema import Data

BATCH_ROWS = 256

Batch = Sequence[tuple[Row, Conversation | RowRefused]]
"""Rows with their conversations, or why they have none."""


class Counts(Struct):
    """What became of the rows."""

    rows: int = 0
    conversations: int = 0
    """Rows that gave at least one sample."""
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    left_out: int = 0
    """Rows refused: empty, without an answer, refused by the template."""
    dropped: int = 0
    """Samples longer than a row that were dropped, or in which nothing was left to learn."""
    cut: int = 0
    split: int = 0
    """Samples split into several rows."""


def batches(items: Iterator[tuple[Row, Conversation | RowRefused]]) -> Iterator[Batch]:
    """Rows, a batch at a time."""
    while batch := list(islice(items, BATCH_ROWS)):
        yield batch


class Examiner:
    """Counts and problems of all rows that were put through ``take``."""

    def __init__(self, data: Data, tokenizer: ChatTokenizer):
        self.counts = Counts()
        self.notes: dict[str, int] = {}
        """Conversations for which something was changed for the template, by kind."""
        self._data = data
        self._tokenizer = tokenizer
        self._tallies: dict[int, Tally] = {}

    def take(self, source: int, batch: Batch) -> Iterator[tuple[Conversation, list[Rendered], list[int]]]:
        """Each conversation that renders, the samples it gives, and their lengths before any cut."""
        tally = self._tallies.setdefault(source, Tally(source))
        self.counts.rows += len(batch)
        usable = []
        for row, one in batch:
            if isinstance(one, RowRefused):
                self._refused(tally, row, one)
            else:
                usable.append((row, one))
        results = render_many([one for _, one in usable], self._tokenizer, self._data.train_on)
        for (row, conversation), result in zip(usable, results, strict=True):
            for kind, example in conversation_findings(conversation):
                tally.add(kind, row.number, example)
            if isinstance(result, RowRefused):
                self._refused(tally, row, result)
                continue
            for note in result[0].notes:
                self.notes[note] = self.notes.get(note, 0) + 1
            samples = [sample for rendered in result for sample in self._fitted(rendered)]
            self._count(samples)
            yield conversation, samples, [len(rendered.token_ids) for rendered in result]

    def problems(self) -> list[DataProblem]:
        """Everything found, errors first."""
        found = [problem for tally in self._tallies.values() for problem in tally.problems()]
        return sorted(found, key=lambda p: p.severity != "error")

    def _refused(self, tally: Tally, row: Row, refused: RowRefused) -> None:
        self.counts.left_out += 1
        tally.add(refused.kind, row.number, refused.reason)

    def _fitted(self, rendered: Rendered) -> list[Rendered]:
        limit, too_long = self._data.max_length, self._data.too_long
        fitted = fit(rendered, limit, too_long, self._tokenizer.bos_id)
        if not fitted:
            self.counts.dropped += 1
        elif len(rendered.token_ids) > limit:
            if too_long == "split":
                self.counts.split += 1
            else:
                self.counts.cut += 1
        return fitted

    def _count(self, samples: Sequence[Rendered]) -> None:
        counts = self.counts
        counts.conversations += bool(samples)
        counts.samples += len(samples)
        counts.tokens += sum(len(sample.token_ids) for sample in samples)
        counts.trained_tokens += sum(sample.trained_count for sample in samples)
