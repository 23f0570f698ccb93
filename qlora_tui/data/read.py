"""Reads rows from files, plain or compressed: all of them in order, or one by its number.

Used by ``formats`` (for the first rows) and by ``dataset`` and ``inspection`` (to stream all of them). Only a
chunk of the file is in memory at a time. If a row cannot be read but later rows can, it is a ``Row`` with
``error`` set; a file that cannot be read to its end raises ``UserError``. One row of a large JSONL file is
found through an index of the lines in each megabyte, built only as far as needed.
"""

from __future__ import annotations

import csv
import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec

from qlora_tui.data.arrow_rows import arrow_rows
from qlora_tui.data.json_rows import json_rows, repeated_key_warning, without_repeats
from qlora_tui.data.row import (
    DEEPEST,
    LARGEST_ROW_BYTES,
    DamagedFileError,
    Line,
    Row,
    TooLarge,
    distinct_names,
    is_too_deep,
    line_over_bound,
    rough_bytes,
    row_too_large,
    too_large,
)
from qlora_tui.data.text_reader import (
    BOM,
    CHUNK_BYTES,
    NUL_BYTES,
    BrokenFileError,
    Position,
    Stream,
    bad_utf8,
    opened,
)
from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize

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
"""Format of a file, keyed by the end of its name (before ``.gz`` or ``.zst``)."""
COMPRESSED = (".gz", ".zst", ".zstd")
_MAX_CELLS = 1_000_000
_LEAST_LINES_INSIDE = 5
"""Minimum number of row-like lines inside one value for a warning; fewer lines count as part of its text."""
_BOM = BOM.encode()
_FIRST_BYTES = 8 << 20
_decode = msgspec.json.Decoder().decode
_KEYS = (b'":', b'" :', b'"\t:')
"""Byte sequences that follow a key; a string may contain them too."""


def kind_of(path: Path) -> str:
    """Return the format of a file by its name (``json``, ``csv``, see ``SUFFIXES``); empty if unknown."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return SUFFIXES.get(Path(name).suffix, "")


def rows(path: Path, position: Position | None = None) -> Iterator[Row]:
    """Yield every row of one file, in order, and update ``position`` with the progress.

    Raises ``UserError`` if the file is empty or damaged, or cannot be read. A file without a known suffix is
    read as JSON if it starts like JSON, otherwise as text.
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
    """Return the parsed row; None for a blank line."""
    return jsonl_row(raw.number, raw.text) if isinstance(raw, Line) else raw


def raw_rows(path: Path, position: Position | None = None) -> Iterator[Row | Line]:
    """Yield every row of one file; lines of a JSONL file are unparsed and include blank ones."""
    kind = kind_of(path)
    empty = UserError(
        "Empty file", what=f"{path} is empty.", fix="Choose another file, or download this one again."
    )
    try:
        if kind in ("parquet", "arrow"):
            if not path.stat().st_size:
                raise empty
            yield from arrow_rows(path, kind, position)
            return
        with opened(path, position) as stream:
            if not stream.peek():
                raise empty
            # Without a known suffix, the file counts as JSON if it starts like JSON.
            starts_as_json = stream.peek().lstrip()[:1] in (b"[", b"{")
            yield from _READERS[kind or ("json" if starts_as_json else "text")](stream)
    except BrokenFileError as error:
        why = "It is unclear where the next row begins, so no later row can be read."
        raise unreadable(path, error.kind, f"Line {error.line}: {error}", why) from error
    except TooLarge as error:
        raise too_large(path, error) from error
    except OSError as error:
        raise cannot_read(path, error) from error


def cannot_read(path: Path, error: OSError) -> UserError:
    return UserError(
        "Cannot read the data",
        what=f"{path}: {error.strerror or error}.",
        fix="Check the file and its permissions.",
    )


def unreadable(path: Path, kind: str, reason: str, why: str = "") -> DamagedFileError:
    """Build the error for a file that cannot be read to its end, or that has no readable row.

    ``kind`` is the kind of error, as in ``Row.kind``; ``reason`` names the line.
    """
    titles = {"bad-json": "Not valid JSON", "bad-encoding": "Not UTF-8", "bad-row": "Not a table"}
    # Every other byte of a Western text in UTF-16 is NUL.
    encoding = "UTF-16LE" if NUL_BYTES in reason else "LATIN1"
    other_name = "If each line is a row, name the file .jsonl: then its other rows can be read."
    if kind_of(path) == "jsonl":
        other_name = "If the file is one array of rows, name it .json."
    fixes = {
        "bad-json": f"Correct the line, or download the file again. {other_name}",
        "bad-encoding": f"Convert the file: iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}",
        "bad-row": "Check the separator and the quotes of the file. A quote inside a value is written twice, "
        'and the value is in quotes: "a 5"" screen".',
    }
    return DamagedFileError(
        titles.get(kind, "Cannot read"),
        what=f"{path}: {reason.removesuffix('.')}.",
        why=why,
        fix=fixes.get(kind, ""),
    )


def jsonl_row(number: int, line: bytes) -> Row | None:
    """Parse one line of a JSONL file; None for a blank line."""
    line = line.removeprefix(_BOM).strip()
    if not line:
        return None
    if reason := bad_utf8(line) or (NUL_BYTES if b"\x00" in line else ""):
        return Row(number=number, kind="bad-encoding", error=f"Line {number}: {reason}.")
    if over := line_over_bound(line):
        return Row(number=number, kind="bad-json", error=f"Line {number} cannot be read: {over}.")
    try:
        value = _decode(line)
        if line.count(b"[") + line.count(b"{") > DEEPEST and is_too_deep(value):
            raise RecursionError("nested too deeply")
        return Row(number=number, value=value, warnings=repeated_keys(line, value))
    except (msgspec.DecodeError, RecursionError) as error:
        return Row(number=number, kind="bad-json", error=f"Line {number} is not valid JSON: {error}.")


def repeated_keys(line: bytes, value: Any) -> tuple[tuple[str, str], ...]:
    """Return the warning on the first key that occurs twice in an object of a line; empty if there is none.

    ``value`` is the decoded line.
    """
    if sum(map(line.count, _KEYS)) <= _count_keys(value):
        return ()
    repeated: list[str] = []
    json.loads(line, object_pairs_hook=lambda pairs: without_repeats(pairs, repeated))
    return repeated_key_warning(repeated)


def _count_keys(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_count_keys, value.values()))
    return sum(map(_count_keys, value)) if isinstance(value, list) else 0


def _text_rows(stream: Stream) -> Iterator[Row]:
    """Yield paragraphs as rows; blank lines separate them."""
    paragraph: list[str] = []
    start, size, damage = 1, 0, ""
    for number, (line, reason) in enumerate(chain(stream.text_lines(), [("", "")]), 1):
        if line.strip():
            if not paragraph:
                start, size, damage = number, 0, ""
            paragraph.append(line.rstrip("\r\n"))
            damage = damage or (f"Line {number}: {reason}." if reason else "")
            size += len(line)
            if size > LARGEST_ROW_BYTES:
                raise row_too_large(f"the paragraph that begins on line {start:,}")
        elif paragraph:
            if damage:
                yield Row(number=start, kind="bad-encoding", error=damage)
            else:
                yield Row(number=start, value={"text": "\n".join(paragraph)})
            paragraph = []


def _table_rows(stream: Stream, delimiter: str | None) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_ROW_BYTES)
    lines = stream.text_lines()
    first = next(lines, ("", ""))
    delimiter = delimiter or _delimiter(first[0])
    table = _TableLines(chain([first], lines), delimiter)
    # Otherwise a quote that is never closed would include the rest of the file without an error.
    reader = csv.reader(table, delimiter=delimiter, strict=True)
    header: list[str] = []
    number = 0
    while True:
        table.begin_row(number + 1)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            table.check_quotes()
            if not header:
                raise BrokenFileError(
                    "bad-row", table.first_line, "a line break inside the header"
                ) from error
            number += 1
            yield Row(
                number=number,
                kind="bad-row",
                error=f"Row {number}, line {table.line}: a carriage return in an unquoted value.",
            )
            continue
        if not header:
            if table.damage:
                raise BrokenFileError("bad-encoding", table.line, table.damage.partition(": ")[2])
            header = distinct_names([cell.strip() for cell in cells])
            continue
        if not any(cells):
            continue
        number += 1
        where = f"Row {number}, line {table.line}"
        warnings: tuple[tuple[str, str], ...] = ()
        if table.line - table.first_line > _LEAST_LINES_INSIDE and _holds_rows(cells, len(header), delimiter):
            taken = f"Row {number} spans lines {table.first_line:,} to {table.line:,}"
            warnings = (("rows-in-value", f"{taken}, and each line inside it could be a row of its own."),)
        what = ""
        if table.damage:
            table.check_damage()
            yield Row(number=number, kind="bad-encoding", error=table.damage, warnings=warnings)
            continue
        if len(cells) != len(header):
            what = f"{pluralize(len(cells), 'value')} for {pluralize(len(header), 'column')}"
        elif any(cell.startswith(' "') for cell in cells):
            what = "a space before an opening quote, so that the quotes are part of the value"
        elif cells[0].strip() == header[0] and [cell.strip() for cell in cells] == header:
            what = "the header again, as if tables had been joined"
        if what:
            yield Row(number=number, kind="bad-row", error=f"{where}: {what}.", warnings=warnings)
        else:
            yield Row(number=number, value=dict(zip(header, cells, strict=True)), warnings=warnings)


def _holds_rows(cells: list[str], width: int, delimiter: str) -> bool:
    """Return whether all lines inside one value look like rows, so that a stray quote may have opened it.

    A line of prose or code rarely has exactly as many separators as a row, with no space after any of them.
    """
    for cell in cells if width > 1 else ():
        inside = cell.split("\n")[1:-1]
        if len(inside) >= _LEAST_LINES_INSIDE and all(
            line.count(delimiter) == width - 1
            and f"{delimiter} " not in line
            and line.strip()[-1:] != delimiter
            for line in inside
        ):
            return True
    return False


class _TableLines:
    """Lines for a CSV reader, which joins lines while a quote is open. Raises ``TooLarge``."""

    def __init__(self, lines: Iterator[tuple[str, str]], delimiter: str) -> None:
        self._lines = lines
        self._delimiter = delimiter
        self.line = 0
        """Number of the last line that was read."""
        self.begin_row(1)

    def begin_row(self, number: int) -> None:
        self._row, self._size, self._cells = number, 0, 0
        self._row_lines: list[str] = []
        self.first_line = self.line + 1
        self.damage = ""
        """Reason why the row is not valid UTF-8, naming the line; empty if it is valid."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line, reason = next(self._lines)
        self.line += 1
        self._row_lines.append(line)
        if reason and not self.damage:
            self.damage = f"Line {self.line}: {reason}."
        self._size += len(line)
        if self._size > LARGEST_ROW_BYTES:
            opened_on = self._unclosed_quote()
            hint = f"; the quote that opens on line {opened_on[0]:,} may not be closed" if opened_on else ""
            raise TooLarge(f"{row_too_large(f'row {self._row:,}')}{hint}")
        if len(line) > _MAX_CELLS:
            self._cells += line.count(self._delimiter)
            if self._cells > _MAX_CELLS:
                raise TooLarge(f"row {self._row:,} has more than {_MAX_CELLS:,} cells")
        return line

    def check_quotes(self) -> None:
        """Raise ``BrokenFileError`` if a quote is never closed, or if text follows a closing quote. The error
        names the line of the opening quote.
        """
        if place := self._unclosed_quote():
            line, text_follows_on = place
            what = "a quote opens a value here"
            closing = f"text follows the closing quote on line {text_follows_on}" if text_follows_on else ""
            raise BrokenFileError("bad-row", line, f"{what}, and {closing or 'is not closed'}")

    def check_damage(self) -> None:
        """Raise ``BrokenFileError`` if bytes that are not UTF-8 precede a quote in a cell, because the quote
        might be an opening quote.
        """
        hidden_quote = re.compile(
            rf'(?:\A|\n|{re.escape(self._delimiter)})[^"{re.escape(self._delimiter)}]*\ufffd"'
        )
        if hidden_quote.search("".join(self._row_lines)):
            raise BrokenFileError("bad-encoding", self.first_line, "bytes that are not UTF-8 before a quote")

    def _unclosed_quote(self) -> tuple[int, int] | None:
        """Return (line of the opening quote, line of the closing quote) of the first value with wrong quotes.

        The second is 0 if the quote is never closed; otherwise, text follows the closing quote. None if all
        quotes are correct.
        """
        text = "".join(self._row_lines)
        end = re.escape(self._delimiter) + r"\r\n"
        # Possessive quantifiers: a value never gives back characters, so one pass is enough.
        quoted = r'"(?:[^"]|"")*+"'
        value = re.compile(rf'{quoted}(?=[{end}]|\Z)|[^{end}"][^{end}]*+|(?=[{end}]|\Z)')
        at = 0
        while at < len(text):
            match = value.match(text, at)
            if match is None:
                closed = re.compile(quoted).match(text, at)
                line = self.first_line + text.count("\n", 0, at)
                return line, line + text.count("\n", at, closed.end()) if closed else 0
            at = match.end() + 1
        return None


def _delimiter(header: str) -> str:
    return max(",;\t|", key=header.count) if any(d in header for d in ",;\t|") else ","


_READERS: dict[str, Callable[[Stream], Iterator[Row | Line]]] = {
    "json": json_rows,
    "jsonl": lambda stream: (Line(number, line) for number, line in enumerate(stream.lines(), 1)),
    "csv": lambda stream: _table_rows(stream, None),
    "tsv": lambda stream: _table_rows(stream, "\t"),
    "text": _text_rows,
}


_INDEXED_BYTES = 4 << 20
"""Size below which ``row_at`` reads a JSONL file from its start, without an index."""


def row_at(path: Path, number: int) -> Row | None:
    """Return the row with this number, or the next existing one; None past the end. Raises ``UserError``."""
    stat = path.stat()
    if path.name.lower().endswith((".jsonl", ".ndjson")) and stat.st_size >= _INDEXED_BYTES:
        return _line_row(path, number, _index(path, stat.st_size, stat.st_mtime_ns))
    return next((row for row in rows(path) if row.number >= number), None)


class _LineIndex:
    """The number of line ends before each megabyte of a file, counted only as far as needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = array("Q", [0])

    def chunk_of(self, line: int) -> tuple[int, int]:
        """Return (number of the last megabyte that begins before this line, number of line ends before this
        megabyte).
        """
        if self._before[-1] < line - 1:
            self._count_on(line)
        chunk = max(0, bisect_left(self._before, line - 1) - 1)
        return chunk, self._before[chunk]

    def _count_on(self, line: int) -> None:
        with self._path.open("rb") as file:
            file.seek((len(self._before) - 1) * CHUNK_BYTES)
            while self._before[-1] < line - 1 and (chunk := file.read(CHUNK_BYTES)):
                self._before.append(self._before[-1] + chunk.count(b"\n"))


@lru_cache(maxsize=4)
def _index(path: Path, size: int, modified_ns: int) -> _LineIndex:
    """Return the index of a file with this size and modification time."""
    return _LineIndex(path)


def _line_row(path: Path, number: int, index: _LineIndex) -> Row | None:
    chunk, before = index.chunk_of(number)
    with path.open("rb") as file:
        file.seek(chunk * CHUNK_BYTES)
        # A line over the length limit comes in parts; the first part reports that it is too long.
        lines = iter(lambda: file.readline(LARGEST_ROW_BYTES + 1), b"")
        for line_number, line in enumerate(lines, before + 1):
            if line_number >= number:
                row = jsonl_row(line_number, line.removeprefix(b"\xef\xbb\xbf") if line_number == 1 else line)
                if row is not None:
                    return row
    return None
