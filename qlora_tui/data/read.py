"""Rows from files: JSON, JSONL, CSV, TSV, Parquet and text, plain or compressed, and folders of them.

Used by ``formats`` (for the first rows) and by ``dataset`` and ``inspection`` (to stream all of them). Only a
chunk of the file is in memory at a time. A row that cannot be read is a ``Row`` with ``error`` set; a file
that cannot be read at all raises ``UserError``.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import msgspec

from qlora_tui.data.arrow_rows import arrow_rows
from qlora_tui.data.bounds import (
    DEEPEST,
    LARGEST_ROW_BYTES,
    TooLarge,
    is_too_deep,
    line_over_bound,
    rough_bytes,
    row_too_large,
    too_large,
)
from qlora_tui.data.json_rows import json_rows
from qlora_tui.data.row import Line, Row
from qlora_tui.data.text_reader import NotUtf8, Position, Stream, bad_utf8, opened
from qlora_tui.errors import UserError

SUFFIXES = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
"""Format of a file by the end of its name (before ``.gz`` or ``.zst``)."""
COMPRESSED = (".gz", ".zst", ".zstd")
_EVALUATION_SPLITS = ("valid", "validation", "val", "test", "dev", "eval", "evaluation")
_IGNORED = (
    "readme",
    "license",
    "licence",
    "dataset_info",
    "dataset_infos",
    "dataset_dict",
    "state",
    "sources",
)
_MAX_CELLS = 1_000_000
_FIRST_BYTES = 8 << 20
_decode = msgspec.json.Decoder().decode

COLUMNAR = ("parquet", "arrow")
"""Formats whose reader is slow to import and takes memory that the app should not hold."""


def kind_of(path: Path) -> str:
    """Return the format of a file by its name (``json``, ``csv``, see ``SUFFIXES``); empty if unknown."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return SUFFIXES.get(Path(name).suffix, "")


def files_of(path: Path) -> tuple[list[Path], str]:
    """Return the data files of ``path``, and a note on the files of a folder that were left out.

    A folder gives its files, sorted by name, including subfolders. Where some names mark training files,
    files whose names mark validation or test are left out.
    """
    if not path.exists():
        raise UserError(
            "No such data",
            what=f"{path} does not exist.",
            fix="Check the path; relative paths start at the folder you are in.",
        )
    if not path.is_dir():
        if not path.is_file():
            raise UserError(
                "Not a file",
                what=f"{path} is a pipe, a socket or a device.",
                why="Data is read more than once.",
                fix="Save its content to a file, and name that.",
            )
        return [path], ""
    # Unlike rglob, walk skips a folder that disappears during the search.
    inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    files = sorted(p for p in inside if p.is_file() and kind_of(p) and _is_data(p.relative_to(path)))
    if not files:
        raise UserError(
            "No data in the folder",
            what=f"{path} holds no file that ends in {', '.join(SUFFIXES)}, with or without .gz or .zst.",
            fix="Name a folder with data files, or a file.",
        )
    training = [p for p in files if not _held_out(p)]
    if not training or len(training) == len(files):
        return files, ""
    left = ", ".join(p.name for p in files if _held_out(p))
    return training, f"skipped, because the name says validation or test: {left}"


def _is_data(path: Path) -> bool:
    return (
        not any(part.startswith(".") for part in path.parts)
        and path.name.split(".")[0].lower() not in _IGNORED
    )


def _held_out(path: Path) -> bool:
    words = path.name.lower().replace("-", "_").replace(".", "_").split("_")
    return any(word in _EVALUATION_SPLITS for word in words)


def rows(path: Path, position: Position | None = None) -> Iterator[Row]:
    """Yield every row of one file, in order; ``position`` is updated with the progress.

    Raises ``UserError`` if the file is empty, unreadable, damaged or of no known kind.
    """
    return filter(None, map(row_of, raw_rows(path, position)))


def first_rows(path: Path, most: int) -> list[Row]:
    """Return the first ``most`` rows of a file, or fewer if they are large. Raises ``UserError``."""
    first: list[Row] = []
    size = 0
    for row in islice(rows(path), most):
        first.append(row)
        size += rough_bytes(row.value)
        if size > _FIRST_BYTES:
            break
    return first


def row_of(raw: Row | Line) -> Row | None:
    """Return the row; None for a blank line."""
    return jsonl_row(raw.number, raw.text) if isinstance(raw, Line) else raw


def raw_rows(path: Path, position: Position | None = None) -> Iterator[Row | Line]:
    """Yield every row of one file, with the lines of a JSONL file unparsed and including blank ones."""
    kind = kind_of(path)
    try:
        if kind in COLUMNAR:
            yield from arrow_rows(path, kind, position)
            return
        with opened(path, position) as stream:
            if not stream.peek():
                raise UserError(
                    "Empty file",
                    what=f"{path} is empty.",
                    fix="Choose another file, or download this one again.",
                )
            yield from _READERS[kind or _guess(stream)](stream)
    except NotUtf8 as error:
        yield Row(number=error.line, kind="bad-encoding", error=str(error))
    except TooLarge as error:
        raise too_large(path, error) from error
    except OSError as error:
        raise UserError(
            "Cannot read the data",
            what=f"{path}: {error.strerror or error}.",
            fix="Check the file and its permissions.",
        ) from error


def _guess(stream: Stream) -> str:
    """Guess the format of a file without a known suffix: JSON if it starts like it, else text."""
    start = stream.peek().lstrip()[:1]
    return "json" if start in (b"[", b"{") else "text"


def _jsonl_lines(stream: Stream) -> Iterator[Line]:
    return (Line(number, line) for number, line in enumerate(stream.lines(), 1))


def jsonl_row(number: int, line: bytes) -> Row | None:
    """Parse one line of a JSONL file; None for a blank one."""
    line = line.strip()
    if not line:
        return None
    if reason := bad_utf8(line):
        return Row(number=number, kind="bad-encoding", error=f"Line {number}: {reason}.")
    if over := line_over_bound(line):
        return Row(number=number, kind="bad-json", error=f"Line {number} cannot be read: {over}.")
    try:
        value = _decode(line)
        if line.count(b"[") + line.count(b"{") > DEEPEST and is_too_deep(value):
            raise RecursionError("nested too deeply")
        return Row(number=number, value=value)
    except (msgspec.DecodeError, RecursionError) as error:
        return Row(number=number, kind="bad-json", error=f"Line {number} is not valid JSON: {error}.")


def _text_rows(stream: Stream) -> Iterator[Row]:
    """Yield paragraphs as rows; blank lines separate them."""
    held: list[str] = []
    start, size = 1, 0
    for number, line in enumerate(stream.text_lines(), 1):
        if line.strip():
            if not held:
                start, size = number, 0
            held.append(line.rstrip("\r\n"))
            size += len(line)
            if size > LARGEST_ROW_BYTES:
                raise row_too_large(f"the paragraph that begins on line {start:,}")
        elif held:
            yield Row(number=start, value={"text": "\n".join(held)})
            held = []
    if held:
        yield Row(number=start, value={"text": "\n".join(held)})


def _csv_rows(stream: Stream) -> Iterator[Row]:
    return _table_rows(stream, None)


def _tsv_rows(stream: Stream) -> Iterator[Row]:
    return _table_rows(stream, "\t")


def _table_rows(stream: Stream, delimiter: str | None) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_ROW_BYTES)
    lines = stream.text_lines()
    header_line = next(lines, "")
    delimiter = delimiter or _delimiter(header_line)
    fed = _FedLines(_chain(header_line, lines), delimiter)
    reader = csv.reader(fed, delimiter=delimiter)
    header: list[str] = []
    number = 0
    while True:
        fed.begin_row(number + 1)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number += 1
            yield Row(
                number=number, kind="bad-row", error=f"Row {number}, near line {reader.line_num}: {error}."
            )
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            continue
        if not any(cells):
            continue
        number += 1
        if len(cells) != len(header):
            yield Row(
                number=number,
                kind="bad-row",
                error=f"Row {number}, line {reader.line_num}: {len(cells)} values for {len(header)} columns.",
            )
            continue
        yield Row(number=number, value=dict(zip(header, cells, strict=True)))


class _FedLines:
    """Lines for a CSV reader, which joins as many as the quotes of a row require. Raises ``TooLarge``."""

    def __init__(self, lines: Iterator[str], delimiter: str) -> None:
        self._lines = lines
        self._delimiter = delimiter
        self.begin_row(1)

    def begin_row(self, number: int) -> None:
        self._row, self._size, self._cells = number, 0, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._size += len(line)
        if self._size > LARGEST_ROW_BYTES:
            raise row_too_large(f"row {self._row:,}")
        if len(line) > _MAX_CELLS:
            self._cells += line.count(self._delimiter)
            if self._cells > _MAX_CELLS:
                raise TooLarge(f"row {self._row:,} has more than {_MAX_CELLS:,} cells")
        return line


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter(header: str) -> str:
    return max(",;\t|", key=header.count) if any(d in header for d in ",;\t|") else ","


_READERS: dict[str, Callable[[Stream], Iterator[Row | Line]]] = {
    "json": json_rows,
    "jsonl": _jsonl_lines,
    "csv": _csv_rows,
    "tsv": _tsv_rows,
    "text": _text_rows,
}
