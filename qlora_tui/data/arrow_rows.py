"""Rows of Parquet files and Arrow streams, validated before they are used.

Both formats are memory images: a wrong offset in the file crashes the process, and a wrong length takes all
its memory. Each batch is read under a memory bound, validated by Arrow, and converted to Python values one
slice at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from qlora_tui.data.bounds import (
    LARGEST_ROW_BYTES,
    MIB,
    TooLarge,
    check_expansion,
)
from qlora_tui.data.memory_bound import memory_bound
from qlora_tui.data.row import Row, distinct_names
from qlora_tui.data.text_reader import Position
from qlora_tui.errors import UserError

_ROWS = 256
_PIECE_BYTES = 16 * MIB
_LARGEST_ROW_PYTHON_BYTES = 4 * LARGEST_ROW_BYTES
_OBJECT_BYTES = 64
"""Bytes that a value takes as a Python object, in addition to its characters."""
_DEEPEST_TYPE = 30
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""Last bytes of an Arrow stream: the marker of a message, and a length of 0."""
_BATCH_BYTES = 448 * MIB
"""Most bytes that reading one batch may take."""


def arrow_rows(path: Path, kind: str, position: Position | None) -> Iterator[Row]:
    """Yield the rows of a Parquet file (``kind`` is ``parquet``) or an Arrow stream as ``datasets`` stores
    it.

    Raises ``UserError`` where the file is empty, damaged, or not what its name says, and ``TooLarge``.
    """
    # The default pool reserves a gigabyte, which would count as used and could be filled past the bound.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    import pyarrow

    if path.stat().st_size == 0:
        raise UserError(
            "Empty file", what=f"{path} is empty.", fix="Choose another file, or download this one again."
        )
    number = 0
    try:
        batches, names = _parquet(path, position) if kind == "parquet" else _stream(path, position)
        for batch in _validated(path, batches):
            batch = batch.rename_columns(distinct_names(batch.schema.names))
            for piece in _pieces(batch, number + 1):
                for value in piece.to_pylist():
                    number += 1
                    for column, labels in names.items():
                        if isinstance(value.get(column), int):
                            # -1 is no label in the datasets library, as in GLUE's test splits.
                            is_named = 0 <= value[column] < len(labels)
                            value[column] = labels[value[column]] if is_named else None
                    yield Row(number=number, value=value)
    except (pyarrow.ArrowException, OSError, ValueError, SystemError, OverflowError, MemoryError) as error:
        says = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, MemoryError):
            says = f"a batch of its rows takes more than {_BATCH_BYTES // MIB} MiB"
        raise UserError(
            "Cannot read the Parquet file" if kind == "parquet" else "Cannot read the Arrow file",
            what=f"{path}, after row {number:,}: {says}",
            fix="Download it again, or convert it to JSONL.",
        ) from error


def _validated(path: Path, batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches after checking every offset and character. Raises ``TooLarge`` and ``ArrowException``."""
    disk_bytes, read_bytes = path.stat().st_size, 0
    while True:
        with memory_bound(_BATCH_BYTES):
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)
        read_bytes += _size(batch, object_bytes=1)
        check_expansion(disk_bytes, read_bytes)
        yield batch


def _pieces(batch: Any, number: int) -> Iterator[Any]:
    """Yield slices of a batch from row ``number``, each small as Python values. Raises ``TooLarge``."""
    size = _size(batch)
    if size <= _PIECE_BYTES:
        yield batch
    elif batch.num_rows > 1:
        half = batch.num_rows // 2
        yield from _pieces(batch.slice(0, half), number)
        yield from _pieces(batch.slice(half), number + half)
    elif size > _LARGEST_ROW_PYTHON_BYTES:
        raise TooLarge(f"row {number:,} takes more than {_LARGEST_ROW_PYTHON_BYTES // MIB} MiB in memory")
    else:
        yield batch


def _size(batch: Any, object_bytes: int = _OBJECT_BYTES) -> int:
    return sum(_python_bytes(column, object_bytes) for column in batch.columns)


def _python_bytes(array: Any, object_bytes: int, depth: int = 0) -> int:
    """Estimate the bytes of an array as Python values, without creating them. Raises ``TooLarge``.

    ``object_bytes`` is counted for each value, including nulls.
    """
    from pyarrow import types

    kind, count = array.type, len(array)
    if depth > _DEEPEST_TYPE:
        raise TooLarge(f"its columns are nested more than {_DEEPEST_TYPE} deep")
    own, inner = count * object_bytes, (object_bytes, depth + 1)
    if types.is_dictionary(kind):
        return own + _dictionary_bytes(array, object_bytes, depth)
    if types.is_run_end_encoded(kind):
        return own + count * _python_bytes(array.values, *inner)
    if types.is_struct(kind):
        return own + sum(_python_bytes(array.field(n), *inner) for n in range(kind.num_fields))
    lists = types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_map
    if any(is_kind(kind) for is_kind in lists):
        return own + _python_bytes(array.flatten(), *inner)
    if types.is_nested(kind):
        raise TooLarge(f"a column is of the type {kind}, which no text dataset has")
    return own + int(array.nbytes)


def _dictionary_bytes(array: Any, object_bytes: int, depth: int) -> int:
    """Estimate the bytes of a dictionary array's values, counted once for each row that refers to them."""
    import pyarrow.compute as compute
    from pyarrow import types

    values = array.dictionary
    if types.is_nested(values.type) or types.is_dictionary(values.type):
        return len(array) * _python_bytes(values, object_bytes, depth + 1)
    texts = types.is_string, types.is_large_string, types.is_binary, types.is_large_binary
    if not any(is_text(values.type) for is_text in texts):
        return len(array) * (object_bytes + 8)
    lengths = compute.binary_length(values)
    return compute.sum(lengths.take(array.indices)).as_py() or 0


def _parquet(path: Path, position: Position | None) -> tuple[Iterator[Any], dict[str, list[str]]]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    size, total = path.stat().st_size, max(1, file.metadata.num_rows)

    def batches() -> Iterator[Any]:
        done = 0
        for batch in file.iter_batches(batch_size=_ROWS):
            yield batch
            done += batch.num_rows
            if position is not None:
                position.bytes = size * done // total

    return batches(), label_names(file.schema_arrow.metadata or {})


def _stream(path: Path, position: Position | None) -> tuple[Iterator[Any], dict[str, list[str]]]:
    import pyarrow

    # Not mapped: a file truncated during the read would end the process (SIGBUS).
    source = pyarrow.OSFile(str(path))
    reader = pyarrow.ipc.open_stream(source)

    def batches() -> Iterator[Any]:
        for batch in reader:
            yield batch
            if position is not None:
                position.bytes = source.tell()
        # The reader takes the end of the file for that of the stream.
        source.seek(max(0, source.size() - len(_END_OF_STREAM)))
        if source.read() != _END_OF_STREAM:
            raise ValueError("it has no end mark, so its writer or a copy of it was cut off")

    return batches(), label_names(reader.schema.metadata or {})


def label_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Return the names of integer labels by column, as ``datasets`` stores them in a Parquet schema."""
    try:
        features = msgspec.json.decode(metadata[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, TypeError, AttributeError, msgspec.DecodeError):
        return {}
