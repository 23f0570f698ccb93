"""Writes rows to CSV, JSONL and Parquet files, with one batch in memory at a time.

Rows are objects that may differ in their columns, like those of ``read.rows``. CSV and Parquet need all
columns first, so the rows are iterated twice.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

Rows = Callable[[], Iterator[dict[str, Any]]]
_BATCH_ROWS = 512


def write_rows(path: Path, suffix: str, rows: Rows) -> None:
    """Write all rows to a file in the format of ``suffix``, a key of ``WRITERS``. Raises OSError."""
    WRITERS[suffix](path, rows)


def _write_jsonl(path: Path, rows: Rows) -> None:
    with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for row in rows():
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _write_csv(path: Path, rows: Rows) -> None:
    columns: dict[str, None] = {}
    for row in rows():
        columns |= dict.fromkeys(row)
    with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows():
            writer.writerow([_cell(row.get(column)) for column in columns])


def _write_parquet(path: Path, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    types: dict[str, Any] = {}
    for batch in _batches(rows()):
        for column in {column: None for row in batch for column in row}:
            found = _type([row.get(column) for row in batch])
            types[column] = _common(types.get(column, found), found)
    texts = {column for column, type_ in types.items() if type_ is None}
    schema = pyarrow.schema({column: type_ or pyarrow.string() for column, type_ in types.items()})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for batch in _batches(rows()):
            cells = {
                column: [_cell(row.get(column)) if column in texts else row.get(column) for row in batch]
                for column in types
            }
            writer.write_table(pyarrow.table(cells, schema=schema))


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
"""Writers keyed by the end of a file's name."""


def _type(values: list[Any]) -> Any:
    """Return the Arrow type of a column's values; None if they are written as JSON."""
    import pyarrow

    try:
        found = pyarrow.array(values).type
    except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
        return None
    # Arrow would give every row all keys.
    return None if pyarrow.types.is_nested(found) else found


def _common(one: Any, other: Any) -> Any:
    """Return an Arrow type that can hold the values of both types; None if they must be written as JSON."""
    import pyarrow

    if one is None or other is None:
        return None
    try:
        schemas = [pyarrow.schema({"": each}) for each in (one, other)]
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pyarrow.ArrowException:
        return None


def _cell(value: Any) -> Any:
    """Return a value as text; None is kept as an empty cell."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield batch
