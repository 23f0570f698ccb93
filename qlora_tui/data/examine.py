"""Rows looked at a batch at a time: rendered, fitted, checked and counted.

``dataset`` writes what comes out, ``inspect`` measures it; so the two never disagree on what a run
would train on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from msgspec import Struct

from qlora_tui.data.checks import conversation_findings, sample_findings
from qlora_tui.data.conversation import Conversation, RowRefused
from qlora_tui.data.key_table import KeyTable
from qlora_tui.data.lengths import fit
from qlora_tui.data.near_duplicates import NearDuplicates
from qlora_tui.data.problems import DataProblem, Tally
from qlora_tui.data.render import Rendered, Rendering
from qlora_tui.data.report import Counts
from qlora_tui.data.row import Row
from qlora_tui.data.sources import SourceFile
from qlora_tui.data.split import group_key
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.schema import Data

_FIRST_BATCH_ROWS = 32
_BATCH_ROWS = 256

Batch = Sequence[tuple[Row, Conversation | RowRefused]]
"""Rows with their conversations, or why they have none."""


def batches(items: Iterator[tuple[Row, Conversation | RowRefused]]) -> Iterator[Batch]:
    """Rows, a batch at a time: small ones first, so that there is something to see at once."""
    size = _FIRST_BATCH_ROWS
    while batch := list(islice(items, size)):
        yield batch
        size = min(2 * size, _BATCH_ROWS)


class Examined(Struct, frozen=True):
    """A conversation that renders."""

    conversation: Conversation
    key: int
    """The same for rows that say the same (see ``split.group_key``)."""
    samples: list[Rendered]
    """As they will be trained; empty if the length limit leaves nothing."""
    lengths: list[int]
    """Tokens of each before any cut."""


class Examiner:
    """Counts and problems of all rows that were put through ``examined``."""

    def __init__(
        self, data: Data, tokenizer: ChatTokenizer | None, seed: int = 0, near_duplicates: bool = False
    ):
        """Without a tokenizer rows are only read and checked, and give no samples."""
        self.counts = Counts()
        self.notes: dict[str, int] = {}
        """Conversations for which something was changed for the template, by kind."""
        self._data = data
        self._tokenizer = tokenizer
        self._seed = seed
        self._tallies: dict[tuple[int, str], Tally] = {}
        self._seen, self._seen_in_validation = KeyTable(), KeyTable()
        self._near = NearDuplicates() if near_duplicates else None

    def examined(self, file: SourceFile, batches: Iterable[Batch]) -> Iterator[list[Examined]]:
        """The conversations of each batch of a file that render.

        A batch is read while the one before is encoded.
        """
        tally = self._tallies.setdefault((file.source, str(file.path)), Tally(file.source, str(file.path)))
        held: tuple[list[Conversation], Rendering | None] | None = None
        for batch in batches:
            begun = self._begun(tally, batch)
            if held is not None:
                yield self._finished(tally, *held)
            held = begun
        if held is not None:
            yield self._finished(tally, *held)

    def problems(self) -> list[DataProblem]:
        """Everything found, errors first."""
        found = [problem for tally in self._tallies.values() for problem in tally.problems()]
        return sorted(found, key=lambda p: p.severity != "error")

    def _begun(self, tally: Tally, batch: Batch) -> tuple[list[Conversation], Rendering | None]:
        self.counts.rows += len(batch)
        usable: list[Conversation] = []
        for row, one in batch:
            if isinstance(one, RowRefused):
                self._refused(tally, row.number, one)
            else:
                usable.append(one)
        if self._tokenizer is None:
            return usable, None
        return usable, Rendering(usable, self._tokenizer, self._data.train_on)

    def _finished(
        self, tally: Tally, usable: list[Conversation], rendering: Rendering | None
    ) -> list[Examined]:
        results = rendering.results() if rendering else ([] for _ in usable)
        examined = []
        for conversation, result in zip(usable, results, strict=True):
            key = group_key(conversation, self._seed)
            self._check(tally, conversation, key)
            if isinstance(result, RowRefused):
                self._refused(tally, conversation.row, result)
            else:
                examined.append(self._examined(tally, conversation, key, result))
        return examined

    def _check(self, tally: Tally, conversation: Conversation, key: int) -> None:
        row = conversation.row
        for kind, example in conversation_findings(conversation):
            tally.add(kind, row, example)
        seen = self._seen
        if self._is_validation(conversation.source):
            seen = self._seen_in_validation
            if (trained := self._seen.get(key)) is not None:
                tally.add("overlap", row, f"Row {row} of the validation file is row {trained} of the data.")
        earlier = seen.first(key, row)
        if earlier is not None:
            tally.add("duplicate", row, f"Row {row} says the same as row {earlier}.")
        elif self._near is not None and (near := self._near.earlier(conversation, row)) is not None:
            tally.add("near-duplicate", row, f"Row {row} is nearly the same as row {near}.")

    def _is_validation(self, source: int) -> bool:
        """Whether a source is the recipe's validation file, which comes after its sources."""
        return bool(self._data.validation_path) and source >= len(self._data.sources)

    def _examined(
        self, tally: Tally, conversation: Conversation, key: int, rendered: list[Rendered]
    ) -> Examined:
        if self._tokenizer is None:
            self.counts.conversations += 1
            return Examined(conversation, key, [], [])
        row = conversation.row
        for kind, example in sample_findings(self._tokenizer, conversation, rendered, self._data.train_on):
            tally.add(kind, row, example)
        for note in rendered[0].notes:
            self.notes[note] = self.notes.get(note, 0) + 1
        samples = [sample for one in rendered for sample in self._fitted(tally, row, one)]
        self._count(samples)
        return Examined(conversation, key, samples, [len(one.token_ids) for one in rendered])

    def _refused(self, tally: Tally, row: int, refused: RowRefused) -> None:
        self.counts.left_out += 1
        tally.add(refused.kind, row, refused.reason)

    def _fitted(self, tally: Tally, row: int, rendered: Rendered) -> list[Rendered]:
        assert self._tokenizer is not None
        limit, too_long = self._data.max_length, self._data.too_long
        length = len(rendered.token_ids)
        fitted = fit(rendered, limit, too_long, self._tokenizer.bos_id)
        if length > limit:
            kind = "too-long" if fitted or too_long == "drop" else "nothing-left"
            tally.add(kind, row, f"Row {row} has {length:,} tokens, {length - limit:,} over the limit.")
        if not fitted:
            self.counts.dropped += 1
        elif length > limit:
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
