"""Opens and decompresses data files, and decodes their lines. If a line is not UTF-8, the reason is given.

A truncated or damaged compressed file raises an error, and is never read as a shorter file.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast

import zstandard

from qlora_tui.data.row import LARGEST_ROW_BYTES, DamagedFileError, check_expansion, row_too_large
from qlora_tui.errors import UserError
from qlora_tui.files import open_foreign

CHUNK_BYTES = 1 << 20


BOM = "\ufeff"
"""Byte order mark at the start of a file, or of each part of a file that was joined from several files."""
_BINARY = {
    b"PK\x03\x04": (
        "a ZIP archive, as Excel workbooks are",
        "Unpack the archive, or save the sheet as CSV in UTF-8.",
    ),
    b"BZh": ("compressed with bzip2", "Decompress it, or compress it with gzip or zstd."),
    b"\xfd7zXZ\x00": ("compressed with xz", "Decompress it, or compress it with gzip or zstd."),
    b"PAR1": ("a Parquet file", "Give the file a name that ends in .parquet."),
    b"ARROW1": ("an Arrow file", "Convert the file to Parquet or JSONL."),
    b"SQLite format 3\x00": ("an SQLite database", "Export the table as CSV or JSONL."),
    b"\x80\x04\x95": (
        "a pickle, which can run any code",
        "Convert the file to Parquet or JSONL in a place where running its code is safe.",
    ),
}
"""Kind of a binary file, keyed by its first bytes, and what the user can do with it."""
_MAGIC_BYTES = 16
_FRAME_HEADER_BYTES = 18
_CUT_OFF = "it ends in the middle of a block"


class BrokenFileError(Exception):
    """Raised if line ``line`` of a file cannot be read, so that all later rows are unknown."""

    def __init__(self, kind: Literal["bad-json", "bad-encoding", "bad-row"], line: int, reason: str):
        super().__init__(reason)
        self.kind = kind
        """Kind of error, as in ``Row.kind``."""
        self.line = line


class Position:
    """How far a file has been read, for progress display."""

    bytes = 0
    """Number of bytes read from the file as stored on disk, compressed or not."""


class Stream:
    """A decompressed file, read once from start to end."""

    def __init__(
        self,
        raw: BinaryIO,
        file: BinaryIO,
        position: Position | None,
        check_whole: Callable[[], None] = lambda: None,
    ):
        """Open a stream.

        Args:
            raw: the decompressed file.
            file: the file as stored on disk.
            position: updated with the progress.
            check_whole: called at the end of the file; raises ``EOFError`` if the file is truncated.
        """
        self._raw = raw
        self._file = file
        self._position = position
        self._check_whole = check_whole
        self._start = self._next_chunk()
        if self._start.startswith(b"\xef\xbb\xbf"):
            self._start = self._start[3:]

    def peek(self) -> bytes:
        """Return the first bytes, without consuming them."""
        return self._start

    def chunks(self) -> Iterator[bytes]:
        """Yield the content in chunks of a megabyte. Raises ``TooLarge`` if the file expands too much."""
        chunk, read_bytes = self._start, 0
        while chunk:
            disk_bytes = self._file.tell()
            if self._position is not None:
                self._position.bytes = disk_bytes
            read_bytes += len(chunk)
            check_expansion(disk_bytes, read_bytes)
            yield chunk
            chunk = self._next_chunk()

    def _next_chunk(self) -> bytes:
        chunk = self._raw.read(CHUNK_BYTES)
        if not chunk:
            self._check_whole()
        return chunk

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

    def text_lines(self) -> Iterator[tuple[str, str]]:
        """Yield each decoded line with the reason why it is not UTF-8; the reason is empty if it is UTF-8.

        Bytes that are not UTF-8 are replaced, so that later lines can be read.
        """
        for line in self.lines():
            try:
                text, reason = line.decode(), NUL_BYTES if b"\x00" in line else ""
            except UnicodeDecodeError as error:
                text, reason = line.decode(errors="replace"), describe(error)
            yield text.removeprefix(BOM), reason


NUL_BYTES = "NUL bytes, so this is not UTF-8"


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
    """Open the decompressed bytes of ``path``. Raises ``UserError`` if the compression is damaged."""
    with open_foreign(path) as file:
        start = file.peek(4)[:4]
        is_zstd = False
        _refuse_binary(path, file.peek(_MAGIC_BYTES))
        if start[:2] == b"\x1f\x8b":
            raw = cast(BinaryIO, gzip.GzipFile(fileobj=file))
        elif is_zstd := start == b"\x28\xb5\x2f\xfd":
            raw = cast(BinaryIO, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
        else:
            raw = cast(BinaryIO, file)
        try:
            if raw is not file:
                raw = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, raw)))
            # The gzip module detects a truncated file, but the zstd reader takes it for a complete one.
            yield Stream(raw, file, position, lambda: _check_zstd_frames(file) if is_zstd else None)
        except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
            raise DamagedFileError(
                "Damaged compressed file",
                what=f"{path} cannot be decompressed to its end: {error}.",
                why="A download that was cut off is the usual cause.",
                fix="Download the file again.",
            ) from error


def _refuse_binary(path: Path, start: bytes) -> None:
    """Raise ``UserError`` for a file whose first bytes show that it is not text."""
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(
            "Not UTF-8",
            what=f"{path} is encoded as UTF-16.",
            why="Data files must be UTF-8.",
            fix=f"Convert the file: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}",
        )
    for magic, (what, fix) in _BINARY.items():
        if start.startswith(magic):
            raise UserError("Not a text file", what=f"{path} is {what}.", fix=fix)


def _check_zstd_frames(file: BinaryIO) -> None:
    """Raise ``EOFError`` if the last frame of a zstd file is shorter than its blocks' lengths say.

    The format is RFC 8878, section 3.1.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    while header := file.read(_FRAME_HEADER_BYTES):
        start = file.tell() - len(header)
        if header[1:4] == b"\x2a\x4d\x18":  # a skippable frame
            file.seek(start + 8 + int.from_bytes(header[4:8], "little"))
            continue
        parameters = zstandard.get_frame_parameters(header)
        file.seek(start + zstandard.frame_header_size(header))
        is_last = False
        while not is_last:
            block = file.read(3)
            if len(block) < 3:
                raise EOFError(_CUT_OFF)
            value = int.from_bytes(block, "little")
            is_last, is_one_repeated_byte = bool(value & 1), value >> 1 & 3 == 1
            file.seek(1 if is_one_repeated_byte else value >> 3, os.SEEK_CUR)
        if parameters.has_checksum:
            file.seek(4, os.SEEK_CUR)
        if file.tell() > end:
            raise EOFError(_CUT_OFF)
