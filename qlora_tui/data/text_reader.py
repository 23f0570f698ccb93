"""Opening of data files: decompression and UTF-8 decoding, with the line of an error."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from qlora_tui.data.bounds import LARGEST_ROW_BYTES, check_expansion, row_too_large
from qlora_tui.errors import UserError
from qlora_tui.foreign_files import open_foreign

CHUNK_BYTES = 1 << 20


class NotUtf8(Exception):
    """The text is not valid UTF-8 on ``line``."""

    def __init__(self, line: int, reason: str):
        super().__init__(f"Line {line}: {reason}.")
        self.line = line


class Position:
    """How far a file has been read, for progress display."""

    bytes = 0
    """Bytes read of the file as stored on disk, compressed or not."""


class Stream:
    """A decompressed file, read once from start to end."""

    def __init__(self, raw: BinaryIO, file: BinaryIO, position: Position | None):
        self._raw = raw
        self._file = file
        self._position = position
        self._start = raw.read(CHUNK_BYTES)
        if self._start.startswith(b"\xef\xbb\xbf"):
            self._start = self._start[3:]

    def peek(self) -> bytes:
        """Return the first bytes, without consuming them."""
        return self._start

    def chunks(self) -> Iterator[bytes]:
        """Yield the content in chunks of a megabyte. Raises ``TooLarge``, like the other readers."""
        chunk, read_bytes = self._start, 0
        while chunk:
            disk_bytes = self._file.tell()
            if self._position is not None:
                self._position.bytes = disk_bytes
            read_bytes += len(chunk)
            check_expansion(disk_bytes, read_bytes)
            yield chunk
            chunk = self._raw.read(CHUNK_BYTES)

    def lines(self) -> Iterator[bytes]:
        """Yield the content line by line, with line ends."""
        rest: list[bytes] = []
        number, size = 1, 0
        for chunk in self.chunks():
            lines = chunk.split(b"\n")
            size += len(lines[0])
            if size > LARGEST_ROW_BYTES:
                raise row_too_large(f"line {number:,}")
            if len(lines) == 1:
                rest.append(chunk)
                continue
            rest.append(lines[0])
            yield b"".join(rest) + b"\n"
            for line in lines[1:-1]:
                yield line + b"\n"
            rest = [lines[-1]]
            number, size = number + len(lines) - 1, len(lines[-1])
        last = b"".join(rest)
        if last:
            yield last

    def text_lines(self) -> Iterator[str]:
        """Yield the decoded content line by line. Raises ``NotUtf8``."""
        for number, line in enumerate(self.lines(), 1):
            if b"\x00" in line:
                raise NotUtf8(number, "NUL bytes, so this is not a text file")
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise NotUtf8(number, describe(error)) from error


def bad_utf8(line: bytes) -> str:
    """Return why ``line`` is not UTF-8; empty if it is."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return describe(error)
    return ""


def describe(error: UnicodeDecodeError) -> str:
    """Describe the invalid byte and its position."""
    return f"byte 0x{error.object[error.start]:02x} at position {error.start + 1} is not UTF-8"


@contextmanager
def opened(path: Path, position: Position | None = None) -> Iterator[Stream]:
    """Open the decompressed bytes of ``path``. Raises ``UserError`` where the compression is damaged."""
    with open_foreign(path) as file:
        start = file.peek(4)[:4]
        _refuse_utf16(path, start)
        if start[:2] == b"\x1f\x8b":
            raw = cast(BinaryIO, gzip.GzipFile(fileobj=file))
        elif start == b"\x28\xb5\x2f\xfd":
            raw = cast(BinaryIO, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
        else:
            raw = cast(BinaryIO, file)
        try:
            if raw is not file:
                raw = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, raw)))
            yield Stream(raw, file, position)
        except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
            raise UserError(
                "Damaged compressed file",
                what=f"{path} cannot be decompressed to its end: {error}.",
                why="A download that was cut off is the usual cause.",
                fix="Download the file again.",
            ) from error


def _refuse_utf16(path: Path, start: bytes) -> None:
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(
            "Not UTF-8",
            what=f"{path} is UTF-16, from its first line on.",
            why="Data files must be UTF-8.",
            fix=f"Convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}",
        )
