"""Types of the report on data. Cheap to import, for the Data screen."""

from __future__ import annotations

from msgspec import Struct, field

from qlora_tui.data.length_stats import Lengths
from qlora_tui.data.problems import DataProblem


class Counts(Struct):
    """Counts of rows and samples by outcome."""

    rows: int = 0
    conversations: int = 0
    """Rows that gave at least one sample."""
    samples: int = 0
    """Samples, or pairs under a method that compares two answers."""
    tokens: int = 0
    trained_tokens: int = 0
    left_out: int = 0
    """Rows rejected: empty, without an answer, or rejected by the template."""
    dropped: int = 0
    """Samples, or pairs, dropped because they are too long or nothing in them is left to learn."""
    cut: int = 0
    split: int = 0
    """Samples split into several rows."""
    excluded: int = 0
    """Rows that the source excludes (``excluded_rows``); no other count includes them."""


class Piece(Struct, frozen=True):
    """A stretch of a sample for display."""

    text: str
    in_loss: bool = field(name="trained")
    special: bool
    """Whether the piece is one special token."""


class FileReport(Struct, frozen=True):
    """Format and columns of one file."""

    path: str
    bytes: int
    format: str
    columns: dict[str, str]
    """Column of each part."""
    all_columns: tuple[str, ...]
    evidence: tuple[str, ...]
    last_row: int = 0
    """Number of the last row; 0 until the whole file has been read."""


class Report(Struct, frozen=True):
    """Report on one source. JSON-ready through msgspec."""

    files: tuple[FileReport, ...]
    complete: bool
    """Whether every row has been read."""
    share: float
    """Share of the bytes that have been read, 0 to 1."""
    counts: Counts
    """Counts; tokens and samples are 0 without a tokenizer."""
    lengths: Lengths
    too_long: int
    """Rows with a sample longer than ``max_length``."""
    problems: tuple[DataProblem, ...]
    notes: dict[str, int]
    template: str
    """``tokenizer``, or the stock template in use; empty without a tokenizer."""
    thinking: tuple[str, ...] = ()
    """Sentences on the reasoning in the rows and how the template handles it."""


NO_SUCH_ROW = "no-such-row"
"""Code of the error for a row number past the end of a file."""


class Shown(Struct, frozen=True):
    """One row as the model sees it."""

    row: int
    samples: tuple[tuple[Piece, ...], ...]
    """Pieces of each sample, nearly always one; without what truncation removed."""
    token_counts: tuple[int, ...]
    """Tokens of each sample before truncation."""
    trained_counts: tuple[int, ...]
    refused: str = ""
    """Why the row gives no sample; empty if it does."""
    notes: tuple[str, ...] = ()
    findings: tuple[tuple[str, str], ...] = ()
    """Kind and example of each finding on this row."""
    path: str = ""
    """File that the row is from."""
    trained_texts: tuple[tuple[str, ...], ...] = ()
    """Text of each token in the loss, for each sample, but for the first token of a sample: it has none."""
    sides: tuple[str, ...] = ()
    """Of each sample, under a preference method: ``chosen``, ``rejected``, ``good`` or ``bad``."""
