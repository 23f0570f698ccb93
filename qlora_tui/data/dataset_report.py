"""What ``inspect`` says of data, and nothing that costs time to import: the Data screen reads this."""

from __future__ import annotations

from msgspec import Struct

from qlora_tui.data.length_stats import Lengths
from qlora_tui.data.problems import DataProblem


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


class Piece(Struct, frozen=True):
    """A stretch of a sample to show."""

    text: str
    trained: bool
    special: bool
    """One special token."""


class FileReport(Struct, frozen=True):
    """What one file is."""

    path: str
    bytes: int
    format: str
    columns: dict[str, str]
    """Column by part."""
    all_columns: tuple[str, ...]
    evidence: tuple[str, ...]
    last_row: int = 0
    """Number of the last row; 0 until all of the file has been read."""


class Report(Struct, frozen=True):
    """What is known of a source. JSON-ready through msgspec."""

    files: tuple[FileReport, ...]
    complete: bool
    """Whether every row has been read."""
    share: float
    """Of the bytes that have been read, 0 to 1."""
    counts: Counts
    """Tokens and samples are 0 where no tokenizer was given."""
    lengths: Lengths
    too_long: int
    """Samples longer than ``max_length``."""
    problems: tuple[DataProblem, ...]
    notes: dict[str, int]
    template: str
    """``tokenizer``, or the stock template in use; empty without a tokenizer."""
    thinking: tuple[str, ...] = ()
    """Sentences on the reasoning in the rows and what the template makes of it."""


class Shown(Struct, frozen=True):
    """One row as the model will see it."""

    row: int
    samples: tuple[tuple[Piece, ...], ...]
    """Nearly always one; what lies behind a cut is not in it."""
    token_counts: tuple[int, ...]
    """Before any cut."""
    trained_counts: tuple[int, ...]
    refused: str = ""
    """Why there is no sample."""
    notes: tuple[str, ...] = ()
    findings: tuple[tuple[str, str], ...] = ()
    """Kind and example of what the checks say of this row."""
    path: str = ""
    """The file it is from."""
