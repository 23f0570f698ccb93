"""Appending to ``events.jsonl`` and following it.

The file is append-only. A crash can leave its last line torn: readers wait for the newline, and the next
writer truncates the torn end before it appends.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

from qlora_tui.files import open_regular, open_to_read, write_all
from qlora_tui.runs.events import AnyEvent, CheckpointSaved, Failed, Finished, Paused, Stopped, decode, encode

_READ_BYTES = 1 << 20
_BACKWARDS_BYTES = 1 << 16
LONGEST_LINE_BYTES = 1 << 24
"""Maximum length of an event. Longer lines are skipped: a power cut can leave gigabytes without a newline."""


class EventWriter:
    """Appends events; ends of runs and checkpoints are on disk before ``append`` returns."""

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        _cut_torn_end(self._file)

    def append(self, event: AnyEvent) -> None:
        """Write one event in a single system call, so that readers rarely see half of it.

        Raises OSError and leaves the file as it was, so that the event can be written again.
        """
        line = encode(event)
        end = os.fstat(self._file).st_size
        try:
            write_all(self._file, line)
            if isinstance(event, Finished | Failed | Stopped | Paused | CheckpointSaved):
                os.fsync(self._file)
        except OSError:
            if os.fstat(self._file).st_size <= end + len(line):
                os.ftruncate(self._file, end)
            raise

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EventTail:
    """Reads events from where it last stopped, never from the start again."""

    def __init__(self, path: Path, offset: int = 0, unknown: int = 0) -> None:
        self._path = path
        self._offset = offset
        self._is_skipping = False
        """Whether the offset is inside a line that is too long."""
        self.unknown = unknown
        """Number of complete lines this version does not understand."""

    def poll(self, max_bytes: int = _READ_BYTES) -> list[AnyEvent]:
        """Return the complete events among the next ``max_bytes``; empty if there is nothing more yet."""
        chunk = read_from(self._path, self._offset, max_bytes)
        end = chunk.rfind(b"\n") + 1
        if not end and self._is_skipping:
            self._offset = next_data(self._path, self._offset + len(chunk))
            return []
        if not end and len(chunk) == max_bytes:
            if max_bytes < LONGEST_LINE_BYTES:
                return self.poll(max_bytes * 4)
            self._is_skipping = True
            self._offset = next_data(self._path, self._offset + len(chunk))
            return []
        self._offset += end
        events = []
        for line in chunk[:end].splitlines():
            if self._is_skipping:
                self._is_skipping = False
                self.unknown += 1
                continue
            event = decode(line)
            if event is None:
                self.unknown += 1
            else:
                events.append(event)
        return events

    def drain(self) -> Iterator[AnyEvent]:
        """Yield every complete event to the end of the file, holding one read at a time in memory."""
        return chain.from_iterable(self.pieces())

    def pieces(self) -> Iterator[list[AnyEvent]]:
        """Yield complete events to the end of the file, one list per read."""
        before = -1
        while self._offset != before:
            before = self._offset
            yield self.poll()


def last_event(path: Path) -> AnyEvent | None:
    """Return the last complete event, read from the end of the file; None if it has none."""
    return next(events_backwards(path), None)


def events_backwards(path: Path, start: int = 0) -> Iterator[AnyEvent]:
    """Yield complete events in reverse, back to byte ``start``, where a line begins."""
    try:
        end = path.stat().st_size
    except FileNotFoundError:
        return
    torn = True
    most = _BACKWARDS_BYTES
    while end > start:
        begin = max(start, end - most)
        chunk = read_from(path, begin, end - begin)
        if torn:
            # Text after the last newline is not a complete line.
            chunk = chunk[: chunk.rfind(b"\n") + 1]
        # The first line of a chunk may lack its beginning: it is read with the chunk before it.
        first = 0 if begin == start else chunk.find(b"\n") + 1
        if begin > start and first in (0, len(chunk)):
            if most >= LONGEST_LINE_BYTES:
                end, torn, most = max(start, _data_before(path, begin)), True, _BACKWARDS_BYTES
            else:
                most *= 8
            continue
        torn = False
        for line in reversed(chunk[first:].splitlines()):
            event = decode(line)
            if event is not None:
                yield event
        end = begin + first


def read_from(path: Path, offset: int, max_bytes: int) -> bytes:
    """Read up to ``max_bytes`` of a file from ``offset``; empty if it is missing, a pipe or a folder."""
    try:
        file = open_regular(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.EISDIR):
            return b""
        raise
    try:
        # Allocate no more than is there: freeing a megabyte every second fragments the heap.
        there = os.fstat(file).st_size - offset
        return os.pread(file, max(0, min(max_bytes, there)), offset)
    finally:
        os.close(file)


def next_data(path: Path, offset: int) -> int:
    """Return ``offset``, or where the next data begins if there is a hole: it may be terabytes long."""
    try:
        file = open_regular(path)
    except OSError:
        return offset
    try:
        return os.lseek(file, offset, os.SEEK_DATA)
    except OSError as error:
        # ENXIO: nothing but a hole up to the end. Else the file system cannot tell.
        return max(offset, os.fstat(file).st_size) if error.errno == errno.ENXIO else offset
    finally:
        os.close(file)


def _data_before(path: Path, end: int) -> int:
    """Return ``end``, or where the last data before it ends if there is a hole."""
    try:
        file = open_regular(path)
    except OSError:
        return end
    try:
        return _data_end(file, end)
    finally:
        os.close(file)


def _data_end(file: int, end: int) -> int:
    last = position = 0
    try:
        while position < end and (begin := os.lseek(file, position, os.SEEK_DATA)) < end:
            position = os.lseek(file, begin, os.SEEK_HOLE)
            last = min(position, end)
    except OSError as error:
        return last if error.errno == errno.ENXIO else end
    return last


def events_and_damage(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Yield the readable part of each line and whether it is complete; events of other versions are complete.

    A torn last line is skipped, unless it is longer than any event. Raises OSError.
    """
    with open_to_read(path) as file:
        while line := file.readline(LONGEST_LINE_BYTES):
            if line.endswith(b"\n"):
                # A power cut leaves zeros where content was not yet on disk.
                clean = line.lstrip(b"\0")
                is_event = _is_json_object(clean)
                yield (clean if is_event else b""), is_event and clean == line
            elif len(line) == LONGEST_LINE_BYTES:
                while (rest := file.readline(LONGEST_LINE_BYTES)) and not rest.endswith(b"\n"):
                    file.seek(next_data(path, file.tell()))
                yield b"", False


def _is_json_object(line: bytes) -> bool:
    if decode(line) is not None:
        return True
    try:
        # An event of another version is not damaged.
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _cut_torn_end(file: int) -> None:
    size = os.fstat(file).st_size
    end = size
    while end > 0:
        start = max(0, end - _BACKWARDS_BYTES)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = _data_end(file, start)
    if end != size:
        os.ftruncate(file, end)
