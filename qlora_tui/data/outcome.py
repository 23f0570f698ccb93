"""What becomes of a row looked at by itself: read, rendered, fitted and checked.

What depends on other rows (duplicates, counts, sides) ``examine`` adds, in the order of the file; what is
here may be done in any order, and in other processes (see ``workers``).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

from msgspec import Struct

from qlora_tui.data.bounds import rough_bytes
from qlora_tui.data.checks import Finding, conversation_findings, sample_findings
from qlora_tui.data.conversation import Conversation, RowRefused
from qlora_tui.data.lengths import fit
from qlora_tui.data.long_texts import LongText, estimated_long_text
from qlora_tui.data.near_duplicates import sketch
from qlora_tui.data.read import row_of
from qlora_tui.data.render import Choices, Rendered, render_many
from qlora_tui.data.row import Line, Row
from qlora_tui.data.sources import SourceFile, conversation_of
from qlora_tui.data.split import group_key
from qlora_tui.data.store import Sample
from qlora_tui.data.thinking import has_reasoning
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.schema import Data

_FIRST_BATCH_ROWS = 32
_BATCH_ROWS = 256
_BATCH_BYTES = 1 << 20
"""Of text: what is in memory at a time stays small where rows are long."""


class Batch(Struct, frozen=True):
    """Rows of one file that are worked on together."""

    file: SourceFile
    rows: list[Row | Line]
    sketched: bool
    """Whether their sketches are wanted (see ``near_duplicates``)."""


def batches(file: SourceFile, rows: Iterable[Row | Line], sketched: Callable[[], bool]) -> Iterator[Batch]:
    """Rows, a batch at a time: small ones first, so that there is something to see at once."""
    most, held, size = _FIRST_BATCH_ROWS, list[Row | Line](), 0
    for row in rows:
        held.append(row)
        size += len(row.text) if isinstance(row, Line) else rough_bytes(row.value)
        if len(held) >= most or size >= _BATCH_BYTES:
            yield Batch(file, held, sketched())
            most, held, size = min(2 * most, _BATCH_ROWS), [], 0
    if held:
        yield Batch(file, held, sketched())


class Outcome(Struct, frozen=True, array_like=True):
    """What became of a row."""

    row: int
    refused: Finding | None = None
    """Why it gives no sample, where that is so: kind and reason."""
    key: int | None = None
    """The same for rows that say the same (see ``split.group_key``); None where it is no conversation."""
    said: tuple[Finding, ...] = ()
    """What the conversation shows without a tokenizer."""
    found: tuple[Finding, ...] = ()
    """What its samples show, and what the length limit did to them."""
    notes: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    """Tokens of each sample before any cut; the characters of the conversation without a tokenizer."""
    samples: tuple[Sample, ...] = ()
    """As they will be trained; empty if the length limit leaves nothing, or they are not wanted."""
    counts: tuple[int, ...] = ()
    """Samples, tokens, trained tokens, dropped, cut, split."""
    long_text: LongText | None = None
    """For plain text over the length limit that is not split."""
    sketch: bytes = b""


class Outcomes:
    """Looks at rows under the settings of a recipe. Pickled to where the work is done."""

    def __init__(self, data: Data, tokenizer: ChatTokenizer | None, seed: int = 0, keep_samples: bool = True):
        """Without a tokenizer rows are only read and checked, and give no samples."""
        self._data = data
        self._tokenizer = tokenizer
        self._seed = seed
        self._keep_samples = keep_samples

    def of(self, batch: Batch) -> list[Outcome]:
        """One outcome a row, in order; none for a blank line."""
        rows = list(filter(None, map(row_of, batch.rows)))
        read = [conversation_of(row, batch.file) for row in rows]
        usable = [one for one in read if isinstance(one, Conversation)]
        rendered = iter(self._rendered(usable))
        return [
            Outcome(row.number, (one.kind, one.reason))
            if isinstance(one, RowRefused)
            else self._outcome(one, next(rendered), batch.sketched)
            for row, one in zip(rows, read, strict=True)
        ]

    def _rendered(self, usable: Sequence[Conversation]) -> Iterable[list[Rendered] | RowRefused]:
        if self._tokenizer is None:
            return ([] for _ in usable)
        return render_many(usable, self._tokenizer, Choices.of(self._data))

    def _outcome(self, one: Conversation, rendered: list[Rendered] | RowRefused, sketched: bool) -> Outcome:
        said = tuple(conversation_findings(one))
        key = group_key(one, self._seed)
        own = sketch(one).tobytes() if sketched else b""
        if isinstance(rendered, RowRefused):
            return Outcome(one.row, (rendered.kind, rendered.reason), key, said, sketch=own)
        if self._tokenizer is None:
            if one.messages and not one.answers and self._data.train_on == "assistant":
                refused = ("no-answer", "No assistant turn trains.")
                return Outcome(one.row, refused, key, said, sketch=own)
            return Outcome(
                one.row,
                key=key,
                said=said,
                notes=("reasoning-present",) if has_reasoning(one.messages) else (),
                lengths=(_characters(one),),
                long_text=estimated_long_text(one, self._data),
                sketch=own,
            )
        found = list(sample_findings(self._tokenizer, one, rendered, self._data.train_on))
        samples: list[Rendered] = []
        fates = [0, 0, 0]
        long_text = None
        for sample in rendered:
            fitted = self._fitted(one.row, sample, found, fates)
            samples += fitted
            if one.text:
                long_text = self._long_text(sample, fitted)
        if one.text and (long_text is not None or self._data.too_long == "split"):
            found = [finding for finding in found if finding[0] not in ("too-long", "nothing-left")]
        counts = (
            len(samples),
            sum(len(sample.token_ids) for sample in samples),
            sum(sample.trained_count for sample in samples),
            *fates,
        )
        return Outcome(
            row=one.row,
            key=key,
            said=said,
            found=tuple(found),
            notes=rendered[0].notes,
            lengths=tuple(len(sample.token_ids) for sample in rendered),
            samples=tuple(map(_stored, samples)) if self._keep_samples else (),
            counts=counts,
            long_text=long_text,
            sketch=own,
        )

    def _long_text(self, sample: Rendered, fitted: list[Rendered]) -> LongText | None:
        """What becomes of a plain text that is cut or dropped; None for any other."""
        assert self._tokenizer is not None
        length = len(sample.token_ids)
        if length <= self._data.max_length or self._data.too_long == "split":
            return None
        split = fit(sample, self._data.max_length, "split", self._tokenizer.bos_id)
        return LongText(length, len(split), sum(len(part.token_ids) for part in fitted))

    def _fitted(self, row: int, sample: Rendered, found: list[Finding], fates: list[int]) -> list[Rendered]:
        """What the length limit leaves; what it did is added to ``found`` and ``fates``."""
        assert self._tokenizer is not None
        limit, too_long = self._data.max_length, self._data.too_long
        length = len(sample.token_ids)
        fitted = fit(sample, limit, too_long, self._tokenizer.bos_id)
        if length > limit:
            kind = "too-long" if fitted or too_long == "drop" else "nothing-left"
            found.append((kind, f"Row {row} has {length:,} tokens, {length - limit:,} over the limit."))
        if not fitted:
            fates[0] += 1
        elif length > limit:
            fates[2 if too_long == "split" else 1] += 1
        return fitted


def _stored(sample: Rendered) -> Sample:
    weights = None if sample.weights is None else sample.weights.tobytes()
    return Sample(array("I", sample.token_ids).tobytes(), sample.trained, weights)


def _characters(conversation: Conversation) -> int:
    return len(conversation.text) + sum(len(m.content) + len(m.reasoning) for m in conversation.messages)
