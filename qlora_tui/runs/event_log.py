"""Appending to ``events.jsonl`` and following it.

The file is append-only. A crash can leave its last line torn: readers wait for the newline, and the next
writer cuts the torn end off before it appends.
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
"""A longer line is no event: a power cut can leave gigabytes without a line end. It is passed over."""


class EventWriter:
    """Appends events; the ends of a run and its checkpoints are on the disk before ``append`` returns."""

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        _cut_torn_end(self._file)

    def append(self, event: AnyEvent) -> None:
        """Write one event in one system call, so that no reader sees half of it for long.

        Raises OSError; the file is as it was then, so that the event can be written again.
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
    """Reads events from where it stopped the last time, never from the start again."""

    def __init__(self, path: Path, offset: int = 0, unknown: int = 0) -> None:
        self._path = path
        self._offset = offset
        self._is_skipping = False
        """Whether the offset is within a line that is too long."""
        self.unknown = unknown
        """Whole lines this version does not understand."""

    def poll(self, most_bytes: int = _READ_BYTES) -> list[AnyEvent]:
        """The whole events among the next ``most_bytes``; empty when there is nothing more yet."""
        chunk = read_from(self._path, self._offset, most_bytes)
        end = chunk.rfind(b"\n") + 1
        if not end and self._is_skipping:
            self._offset += len(chunk)
            return []
        if not end and len(chunk) == most_bytes:
            if most_bytes < LONGEST_LINE_BYTES:
                return self.poll(most_bytes * 4)
            self._is_skipping = True
            self._offset += len(chunk)
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
        """Every whole event to the end of the file, of which only a read's worth is in memory."""
        return chain.from_iterable(self.pieces())

    def pieces(self) -> Iterator[list[AnyEvent]]:
        """The same, a read at a time."""
        before = -1
        while self._offset != before:
            before = self._offset
            yield self.poll()


def last_event(path: Path) -> AnyEvent | None:
    """The last whole event of the file, read from its end; None where there is none."""
    return next(events_backwards(path), None)


def events_backwards(path: Path, start: int = 0) -> Iterator[AnyEvent]:
    """Whole events, the last one first, back to byte ``start``, where a line begins."""
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
            # Nothing after the last newline is a whole line.
            chunk = chunk[: chunk.rfind(b"\n") + 1]
        # The first line of a part may lack its beginning: it is read with the part before it.
        first = 0 if begin == start else chunk.find(b"\n") + 1
        if begin > start and first in (0, len(chunk)):
            if most >= LONGEST_LINE_BYTES:
                end, torn, most = begin, True, _BACKWARDS_BYTES
            else:
                most *= 8
            continue
        torn = False
        for line in reversed(chunk[first:].splitlines()):
            event = decode(line)
            if event is not None:
                yield event
        end = begin + first


def read_from(path: Path, offset: int, most_bytes: int) -> bytes:
    """Up to ``most_bytes`` of a file from ``offset``; empty where there is none, or a pipe or a folder."""
    try:
        file = open_regular(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.EISDIR):
            return b""
        raise
    try:
        # Room for what is there and no more: a megabyte taken and given back every second leaves holes.
        there = os.fstat(file).st_size - offset
        return os.pread(file, max(0, min(most_bytes, there)), offset)
    finally:
        os.close(file)


def events_and_damage(path: Path) -> Iterator[tuple[bytes, bool]]:
    """What can be read of each line, and whether that is all of it; an event of another version is whole.

    A torn last line is none, unless it is longer than any event. Raises OSError.
    """
    with open_to_read(path) as file:
        while line := file.readline(LONGEST_LINE_BYTES):
            if line.endswith(b"\n"):
                # A power cut leaves zeros where content had not reached the disk.
                clean = line.lstrip(b"\0")
                is_event = _is_json_object(clean)
                yield (clean if is_event else b""), is_event and clean == line
            elif len(line) == LONGEST_LINE_BYTES:
                while (rest := file.readline(LONGEST_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
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
        start = max(0, end - 4096)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end != size:
        os.ftruncate(file, end)
