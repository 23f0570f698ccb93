"""The recipe's sources as files with a format each, and their rows as conversations.

Used by ``dataset`` (to tokenize) and ``inspection`` (to report).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.data.conversation import Conversation, RowRejectedError
from qlora_tui.data.formats import SNIFFED_ROWS, Detection, detect, parse
from qlora_tui.data.hub_dataset import hub_files, is_hub_id
from qlora_tui.data.read import files_inside, files_of, first_rows, kind_of, rows, unreadable
from qlora_tui.data.row import Row
from qlora_tui.data.text_reader import Position
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Source


class SourceFile(Struct, frozen=True):
    """One file of one source, and how to read it."""

    path: Path
    source: int
    """Index of the source in the recipe."""
    detection: Detection


class ValidationSource(Source, frozen=True, kw_only=True):
    """What ``data.validation_path`` names. Of a folder, the files are read that are named as validation."""


def every_source(data: Data) -> list[Source]:
    """Return what a run reads: the sources, then the validation file."""
    validation = [ValidationSource(path=data.validation_path)] if data.validation_path else []
    return [*data.sources, *validation]


def open_source(source: Source, preferences: str, index: int = 0) -> tuple[list[SourceFile], str]:
    """Return the files of a source, each with its format, and a note on what of the source is read.

    ``preferences`` is the recipe's ``data.preferences``. Raises ``UserError`` for a source that does not
    exist, is empty, has no usable field, or holds preferences that the recipe rejects.
    """
    paths, note = paths_of(source)
    files = [SourceFile(path, index, sniff(path, source, preferences)) for path in paths]
    notes = [f"{file.path.name}: {file.detection.note}" for file in files if file.detection.note]
    return files, "; ".join(filter(None, [note, *notes]))


def open_file_of(source: Source, preferences: str, path: str = "") -> SourceFile:
    """Open the file ``path`` of a source, or its first file. Raises ``UserError``."""
    paths, _ = paths_of(source)
    chosen = next((one for one in paths if str(one) == path), paths[0])
    return SourceFile(chosen, 0, sniff(chosen, source, preferences))


def paths_of(source: Source) -> tuple[list[Path], str]:
    """Return the files of a source, with a note; downloads a Hub dataset. Raises ``UserError``."""
    if is_hub_dataset(source.path):
        return hub_files(source.path)
    return files_of(Path(source.path).expanduser(), validation=isinstance(source, ValidationSource))


def is_hub_dataset(name: str) -> bool:
    """Return whether a source's path is a Hub dataset id rather than a file or folder."""
    path = Path(name).expanduser()
    return is_hub_id(name) and not path.exists() and not kind_of(path)


def source_stamps(source: Source) -> tuple[tuple[str, int, int], ...]:
    """Return path, modification time and size of a source's files; empty for a Hub dataset or a missing file.

    Two results differ if a file changed in between.
    """
    path = Path(source.path).expanduser()
    try:
        files = [path / name for name in files_inside(path)] if path.is_dir() else [path]
        stats = [(str(file), file.stat()) for file in files]
    except (OSError, UserError):
        return ()
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def sniff(path: Path, source: Source, preferences: str) -> Detection:
    """Detect the format of one file from its first rows, under ``data.preferences``. Raises ``UserError``."""
    first = first_rows(path, SNIFFED_ROWS)
    readable = [row for row in first if not row.error]
    if not readable and first:
        raise unreadable(path, first[0].kind, first[0].error)
    detection = detect(readable, str(path), source.format, source.columns, preferences)
    note = first[0].file_note if first else ""
    return replace(detection, note=note) if note else detection


def conversations(
    file: SourceFile, position: Position | None = None
) -> Iterator[tuple[Row, Conversation | RowRejectedError]]:
    """Yield every row of a file with its conversation, or with the error that explains why it has none."""
    for row in rows(file.path, position):
        yield row, conversation_of(row, file)


def conversation_of(row: Row, file: SourceFile) -> Conversation | RowRejectedError:
    """Return the conversation of one row of a file, or the error that explains why it has none."""
    try:
        return parse(row, file.detection.layout, file.source)
    except RowRejectedError as refused:
        return refused


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
