"""Loss of each training row before and after training, to find rows that were learned or may do harm.

``row_losses.json`` in the run's folder has a record for each row, the most suspicious first.
``row_losses.f32`` has the loss of each trained token as little-endian floats: for each row, the losses before
training and then those after it. The job ``training.row_losses`` writes both files; commands and the Data
screen read them.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from statistics import median
from typing import Literal, TypeAlias

import msgspec
from msgspec import Struct

from qlora_tui.data.excluded_rows import RowPlace
from qlora_tui.decoding import Count, read_json
from qlora_tui.files import atomic_write
from qlora_tui.remote.calls import changes_box
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.measuring import measure_in_child

RowClass: TypeAlias = Literal["learned", "never learned", "memorized", "contradicting"]
_JOB = "qlora_tui.training.row_losses:measure"
MEMORIZED = 0.1
"""Maximum loss of a memorized row, in nats per token: on average, its tokens are predicted with a probability
of 0.9 or more.
"""
_UNRELATED = 0.25
"""A row counts as never learned if its prompt, compared with another row's prompt, lowers the loss by less
than this fraction of the median over all rows.
"""
_MIN_HELP = 0.05
"""Minimum of the median over all rows of how much a row's own prompt lowers its loss, in nats per token. With
a smaller median, the comparison is meaningless.
"""


class RowLoss(Struct, frozen=True, kw_only=True):
    """The loss of one training row, in nats per trained token."""

    source: Count
    """Index of the row's data source in the recipe, from 0."""
    row: Count
    """Number of the row in its file, from 1."""
    file: str = ""
    """Name of the file in the source; empty if the source is one file."""
    tokens: Count
    """Number of trained tokens."""
    before: float
    """Loss of the base, measured with the adapter off."""
    after: float
    """Loss of the trained model."""
    other_prompt: float
    """Loss of the trained model on this row's answer after the prompt of another row."""
    row_class: RowClass
    contradicts: Count | None = None
    """Number of a row with nearly the same prompt and a different answer, in the same data."""
    contradicts_file: str = ""
    """Name of the file that contains the row ``contradicts``, in the form of ``file``."""
    start: Count = 0
    """Index of the row's first loss in ``row_losses.f32``."""

    @property
    def place(self) -> RowPlace:
        """Place of the row in its source."""
        return RowPlace(self.file, self.row)

    @property
    def description(self) -> str:
        """Class of the row, with the row that it contradicts."""
        if self.contradicts is None:
            return self.row_class
        return f"{self.row_class} row {RowPlace(self.contradicts_file, self.contradicts)}"

    @property
    def suspicion(self) -> float:
        """Loss of the answer after its own prompt, minus its loss after another prompt. A high value
        indicates a wrong answer.
        """
        return self.after - self.other_prompt


class RowLosses(Struct, frozen=True, kw_only=True):
    """All training rows of a run, the most suspicious first."""

    run: str
    seconds: float
    """Seconds that the measurement took."""
    rows: tuple[RowLoss, ...]

    def counts(self) -> dict[RowClass, int]:
        """Return the number of rows of each class."""
        counts: dict[RowClass, int] = {"never learned": 0, "contradicting": 0, "memorized": 0, "learned": 0}
        for row in self.rows:
            counts[row.row_class] += 1
        return counts

    def row_of(self, source: int, place: RowPlace) -> RowLoss | None:
        """Return the record of a row; None if it was not trained on."""
        return next((each for each in self.rows if (each.source, each.place) == (source, place)), None)


class MeasuredRow(Struct, frozen=True, kw_only=True):
    """Measured losses of a row, before it is compared with other rows."""

    source: int
    row: int
    file: str = ""
    before: tuple[float, ...]
    """Loss of each trained token, measured with the adapter off."""
    after: tuple[float, ...]
    other_prompt: float
    contradicts: int | None = None
    contradicts_file: str = ""


def classify(run_id: str, measured: list[MeasuredRow], seconds: float) -> tuple[RowLosses, array[float]]:
    """Classify the rows and sort them by suspicion. Return them, and the losses of all their tokens in the
    order of ``row_losses.f32``.
    """
    help_ = [row.other_prompt - _mean(row.after) for row in measured]
    usual = median(help_) if help_ else 0.0
    rows, tokens = [], array("f")
    for row, helped in zip(measured, help_, strict=True):
        before, after = _mean(row.before), _mean(row.after)
        row_class: RowClass = "learned"
        if row.contradicts is not None:
            row_class = "contradicting"
        elif usual >= _MIN_HELP and helped < _UNRELATED * usual:
            row_class = "never learned"
        elif after <= MEMORIZED < before:
            row_class = "memorized"
        rows.append(
            RowLoss(
                source=row.source,
                row=row.row,
                file=row.file,
                tokens=len(row.after),
                before=before,
                after=after,
                other_prompt=row.other_prompt,
                row_class=row_class,
                contradicts=row.contradicts,
                contradicts_file=row.contradicts_file,
                start=len(tokens),
            )
        )
        tokens.extend(row.before)
        tokens.extend(row.after)
    rows.sort(key=lambda row: (-row.suspicion, row.source, row.place))
    return RowLosses(run=run_id, seconds=seconds, rows=tuple(rows)), tokens


def write_row_losses(run: RunDir, losses: RowLosses, tokens: array[float]) -> None:
    """Write both files, the records last, because they refer to the token losses. Raises OSError."""
    if sys.byteorder == "big":
        tokens = array("f", tokens)
        tokens.byteswap()
    atomic_write(run.row_losses_path.with_suffix(".f32"), tokens.tobytes())
    atomic_write(run.row_losses_path, msgspec.json.encode(losses))


_ROW_LOSSES = msgspec.json.Decoder(RowLosses)


@changes_box
def measure_row_losses(
    run: RunDir,
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RowLosses:
    """Measure all training rows of a run, which takes about as long as training on them once.

    Args:
        run: A run that has ended with an adapter.
        progress: Called with the number of completed passes over samples, and the total.
        should_stop: Called several times per second. If it returns true, the measurement ends.

    Raises:
        JobStopped: ``should_stop`` returned true.
        UserError: The run has no adapter, is in use, or its data or model cannot be read.
    """
    return measure_in_child(_JOB, run, read=read_row_losses, progress=progress, should_stop=should_stop)


def read_row_losses(run: RunDir) -> RowLosses | None:
    """Return the row losses of a run; None if they were not computed, or the file is damaged."""
    return read_json(run.row_losses_path, _ROW_LOSSES)


def token_changes(run: RunDir, row: RowLoss) -> tuple[tuple[float, float], ...]:
    """Return the two losses of each trained token of a row, before and after training; empty if missing."""
    try:
        with run.row_losses_path.with_suffix(".f32").open("rb") as file:
            file.seek(4 * row.start)
            content = file.read(8 * row.tokens)
    except OSError:
        return ()
    if len(content) != 8 * row.tokens:
        return ()
    values = array("f", content)
    if sys.byteorder == "big":
        values.byteswap()
    return tuple(zip(values[: row.tokens], values[row.tokens :], strict=True))


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / max(1, len(values))
