"""Rows of Parquet files and Arrow streams, read by a child process.

Both formats are memory images: a wrong offset in a file crashes the process that reads the file, and a wrong
length takes all its memory. So a confined child reads such files (:mod:`qlora_tui.data.confined`), in small
pieces.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from qlora_tui.data.confined import Confined, KilledError
from qlora_tui.data.row import LARGEST_ROW_BYTES, MIB, Row, TooLarge, check_expansion, distinct_names
from qlora_tui.data.text_reader import Position
from qlora_tui.errors import UserError

_ROWS = 256
_PIECE_BYTES = 16 * MIB
_LARGEST_ROW_BYTES = 4 * LARGEST_ROW_BYTES
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""Last bytes of an Arrow stream, which are the marker of a message and a length of 0."""
_MEMORY_BYTES = 448 * MIB
"""Maximum memory of the child process, in bytes, in addition to what it has at its start."""
_reader = Confined(__name__, cpu_s=60.0, memory_bytes=_MEMORY_BYTES)


def arrow_rows(path: Path, kind: str, position: Position | None) -> Iterator[Row]:
    """Yield the rows of a Parquet file (``kind`` is ``parquet``) or of an Arrow stream of ``datasets``.

    Raises ``UserError`` if the file is damaged, is not of the kind that its name indicates, or takes too much
    time or memory. Raises ``TooLarge`` if a row, or the expanded file, exceeds a limit.
    """
    number = 0
    try:
        for values, position_bytes in _reader.iterate(_pieces, str(path), kind):
            if position is not None:
                position.bytes = position_bytes
            for value in pickle.loads(values):
                number += 1
                yield Row(number=number, value=value)
    except (KilledError, ValueError, MemoryError) as error:
        says = str(error)
        if isinstance(error, MemoryError):
            says = f"a part of it takes more than {_MEMORY_BYTES // MIB} MiB"
        raise UserError(
            "Cannot read the Parquet file" if kind == "parquet" else "Cannot read the Arrow file",
            what=f"{path}, after row {number:,}: {says}",
            fix="Download the file again, or convert it to JSONL.",
        ) from error


def _pieces(path: str, kind: str) -> Iterator[tuple[bytes, int]]:
    """Yield small pickled lists of a file's rows, each with the number of bytes that were read so far.

    Raises ``ValueError`` with the library's message, ``MemoryError``, or ``TooLarge``.
    """
    # The default pool reserves a gigabyte, which would count as used memory and could be filled beyond the
    # limit.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    import pyarrow

    file, position = Path(path), Position()
    number, read_bytes, most_rows = 0, 0, _ROWS
    try:
        batches, names = (_parquet if kind == "parquet" else _stream)(file, position)
        for batch in batches:
            batch.validate(full=True)
            batch = batch.rename_columns(distinct_names(batch.schema.names))
            done = 0
            while done < batch.num_rows:
                values = _pickled(batch.slice(done, most_rows), names)
                if len(values) > _PIECE_BYTES and most_rows > 1:
                    most_rows //= 2
                    continue
                if len(values) > _LARGEST_ROW_BYTES:
                    raise TooLarge(f"row {number + 1:,} takes more than {_LARGEST_ROW_BYTES // MIB} MiB")
                rows = min(most_rows, batch.num_rows - done)
                done, number = done + rows, number + rows
                read_bytes += len(values)
                check_expansion(file.stat().st_size, read_bytes)
                yield values, position.bytes
    except MemoryError:
        raise MemoryError from None  # without Arrow's class, which the reader would have to import
    except (pyarrow.ArrowException, OSError, ValueError, SystemError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _pickled(batch: Any, names: dict[str, list[str]]) -> bytes:
    """Return the pickled rows of a batch, with names in place of integer labels.

    If several rows take too much memory, the result is a placeholder longer than a piece, so that the caller
    tries fewer rows. For a single row, raises ``MemoryError``.
    """
    try:
        values = batch.to_pylist()
        for column, labels in names.items():
            for value in values:
                if isinstance(value.get(column), int):
                    # -1 means no label in the datasets library, for example in GLUE's test splits.
                    is_named = 0 <= value[column] < len(labels)
                    value[column] = labels[value[column]] if is_named else None
        return pickle.dumps(values)
    except MemoryError:
        if batch.num_rows == 1:
            raise
        return bytes(_PIECE_BYTES + 1)


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
        # The reader takes the end of the file for the end of the stream.
        source.seek(max(0, source.size() - len(_END_OF_STREAM)))
        if source.read() != _END_OF_STREAM:
            raise ValueError("it has no end-of-stream marker, so the file is incomplete")

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
