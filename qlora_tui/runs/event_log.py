"""Appending to ``events.jsonl``, following it, and sampling long files.

The file is append-only. A crash can leave an incomplete last line: readers wait for the newline, and the next
writer truncates the line before it appends. :class:`JsonLinesTail` also reads other files of JSON lines.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar, get_args

from qlora_tui.files import open_regular, open_to_read, write_all
from qlora_tui.runs.events import SERIES, AnyEvent, CheckpointSaved, Event, RunEnded, decode, encode

_READ_BYTES = 1 << 20
_BACKWARDS_BYTES = 1 << 16
_LOG_BYTES = 1 << 16
LONGEST_LINE_BYTES = 1 << 24
"""Maximum length of an event. Longer lines are skipped: a power cut can leave gigabytes without a newline."""
_READ_WHOLE_BYTES = 256 << 10
"""Files up to this size are read in full, because they have few steps to skip."""
_MAX_BROKEN = 2000
"""Maximum number of steps with a non-finite loss that are kept in addition to the sample."""
_MAX_EACH = 16_384
_MAX_EACH_BYTES = 16 << 20
"""Maximum total size, in bytes, of the events of one kind that are all kept.

Further events of this kind are sampled like steps, so that reading takes bounded memory for any file.
"""
_BEGINNING = b'{"event":"'
_BROKEN = b'"loss":null'
T = TypeVar("T")


class EventWriter:
    """Appends events. Endings and checkpoints are on disk before ``append`` returns."""

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        _cut_torn_end(self._file)

    def append(self, event: AnyEvent) -> None:
        """Write one event in a single system call, so that readers rarely see an incomplete line.

        If this raises OSError, the file is unchanged, and the event can be written again.
        """
        line = encode(event)
        end = os.fstat(self._file).st_size
        try:
            write_all(self._file, line)
            if isinstance(event, RunEnded | CheckpointSaved):
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


def append_event(path: Path, event: AnyEvent) -> None:
    """Append one event to a file, as :class:`EventWriter` does."""
    with EventWriter(path) as log:
        log.append(event)


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file after removing an incomplete last line. Creates the file if needed.

    The line is on disk when this returns.
    """
    file = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        _cut_torn_end(file)
        write_all(file, line)
        os.fsync(file)
    finally:
        os.close(file)


class LineTail:
    """Reads the complete lines that were appended to a file since the last read, one piece at a time.

    Lines longer than any event are skipped. A hole in such a line is skipped in one step, because a power cut
    can leave gigabytes without content.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset
        self.skipped = 0
        """Number of lines that were skipped because they are too long."""
        self._is_skipping = False

    def poll(self, max_bytes: int = 0) -> bytes:
        """Return the complete lines in the next ``max_bytes`` (default 1 MiB); empty if there are none.

        If the first line is longer than this, more is read, up to :data:`LONGEST_LINE_BYTES`.
        """
        max_bytes = max_bytes or _READ_BYTES
        chunk = read_from(self.path, self.offset, max_bytes)
        end = chunk.rfind(b"\n") + 1
        if not end and len(chunk) == max_bytes < LONGEST_LINE_BYTES and not self._is_skipping:
            return self.poll(max_bytes * 4)
        if not end:
            if chunk and (self._is_skipping or len(chunk) == max_bytes):
                self._is_skipping = True
                self.offset = next_data(self.path, self.offset + len(chunk))
            return b""
        self.offset += end
        if self._is_skipping:
            self._is_skipping = False
            self.skipped += 1
            return chunk[chunk.index(b"\n") + 1 : end]
        return chunk[:end]

    def pieces(self) -> Iterator[bytes]:
        """Yield the lines up to the end of the file, in pieces."""
        before = -1
        while self.offset != before:
            before = self.offset
            yield self.poll()


class JsonLinesTail(Generic[T]):
    """Decoded lines of a :class:`LineTail`."""

    def __init__(self, path: Path, decode_line: Callable[[bytes], T | None], offset: int = 0) -> None:
        """Follow a file from ``offset``. ``decode_line`` returns None for an unknown line."""
        self.unknown = 0
        """Number of complete lines that were not understood."""
        self._lines = LineTail(path, offset)
        self._decode = decode_line

    def poll(self) -> list[T]:
        """Return the values in the next megabyte; empty if nothing was appended."""
        return self._decoded(self._lines.poll())

    def pieces(self) -> Iterator[list[T]]:
        """Yield the values up to the end of the file, in pieces."""
        return map(self._decoded, self._lines.pieces())

    def drain(self) -> Iterator[T]:
        """Yield the values up to the end of the file, with one piece in memory at a time."""
        return chain.from_iterable(self.pieces())

    def _decoded(self, piece: bytes) -> list[T]:
        lines = piece.splitlines()
        decoded = [value for line in lines if (value := self._decode(line)) is not None]
        self.unknown += len(lines) - len(decoded) + self._lines.skipped
        self._lines.skipped = 0
        return decoded


class EventTail(JsonLinesTail[AnyEvent]):
    """The events of a run."""

    def __init__(self, path: Path, offset: int = 0, unknown: int = 0) -> None:
        """Follow events from ``offset``; ``unknown`` counts earlier lines that were not understood."""
        super().__init__(path, decode, offset)
        self.unknown = unknown


def first_event(path: Path, kind: type[T]) -> T | None:
    """Return the first event of a class; None if there is none, or the file cannot be read."""
    with suppress(OSError):
        for event in EventTail(path).drain():
            if isinstance(event, kind):
                return event
    return None


def last_event(path: Path) -> AnyEvent | None:
    """Return the last complete event, read from the end of the file; None if there is none."""
    return next(events_backwards(path), None)


def events_backwards(path: Path, start: int = 0) -> Iterator[AnyEvent]:
    """Yield complete events in reverse order, back to the byte ``start``, at which a line begins."""
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
            # Text after the last newline is an incomplete line.
            chunk = chunk[: chunk.rfind(b"\n") + 1]
        # The first line of a chunk may be incomplete, so it is read with the chunk before it.
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
    """Read up to ``max_bytes`` of a file from ``offset``; empty if it is missing or not a regular file."""
    try:
        file = open_regular(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.EISDIR):
            return b""
        raise
    try:
        # Allocate no more than needed: freeing a megabyte every second fragments the heap.
        there = os.fstat(file).st_size - offset
        return os.pread(file, max(0, min(max_bytes, there)), offset)
    finally:
        os.close(file)


def end_offset(path: Path, last_bytes: int) -> int:
    """Return the offset at which the last ``last_bytes`` of a file begin; 0 if it is shorter or missing."""
    return max(0, path.stat().st_size - last_bytes) if path.exists() else 0


def last_log_lines(path: Path, begin: int = 0) -> list[str]:
    """Return the lines at the end of a log, after the byte ``begin``; empty if it cannot be read."""
    try:
        content = read_from(path, max(begin, end_offset(path, _LOG_BYTES)), _LOG_BYTES)
    except OSError:
        return []
    return content.decode(errors="replace").splitlines()


def next_data(path: Path, offset: int) -> int:
    """Return ``offset``, or the end of the hole at ``offset``. A hole may span terabytes."""
    try:
        file = open_regular(path)
    except OSError:
        return offset
    try:
        return os.lseek(file, offset, os.SEEK_DATA)
    except OSError as error:
        # ENXIO means that a hole reaches the end of the file. Other errors mean that the file system cannot
        # tell.
        return max(offset, os.fstat(file).st_size) if error.errno == errno.ENXIO else offset
    finally:
        os.close(file)


def _data_before(path: Path, end: int) -> int:
    """Return ``end``, or the beginning of the hole before ``end``."""
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
    """Yield the readable part of each line, and whether the line is intact. Events of other versions are
    intact.

    An incomplete last line is skipped, unless it is longer than any event. Raises OSError.
    """
    with open_to_read(path) as file:
        while line := file.readline(LONGEST_LINE_BYTES):
            if line.endswith(b"\n"):
                # A power cut leaves zeros in place of content that was not on disk yet.
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
        # An event of another version is not damage.
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


@dataclass(frozen=True)
class SampledEvents:
    """The events sampled from a run."""

    events: list[AnyEvent]
    end: int
    """Offset in bytes up to which the file was read."""
    unknown: int
    """Number of sampled lines that this version does not understand."""


def sample_events(path: Path, steps: int) -> SampledEvents:
    """Return the events of a run in order, with about ``steps`` of its steps.

    A run of a million steps has 200 MB of events, which take seconds to decode and more memory than a screen
    should use. The last step and the last line are always included. Steps with a non-finite loss and events
    of other kinds are all included up to a limit, and sampled beyond it.
    """
    size = path.stat().st_size if path.exists() else 0
    sampler = _Sampler(1 if size <= _READ_WHOLE_BYTES else max(1, size // steps))
    tail = LineTail(path)
    for piece in tail.pieces():
        sampler.add(piece)
    chosen = sampler.chosen()
    events = [event for line in chosen if (event := decode(line)) is not None]
    return SampledEvents(events, tail.offset, len(chosen) - len(events) + tail.skipped)


class _Sampler:
    """Selects lines of a file: all facts, and an even sample of steps and of other frequent events.

    Steps are recognized by their bytes, because splitting a million of them into lines takes seconds.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        """Distance in bytes between two lines of the sample; 1 for all lines."""
        self._place = 0
        self._lines: dict[int, bytes] = {}
        """The selected lines, by offset in the file."""
        self._last: dict[bytes, tuple[int, bytes]] = {}
        """Last line of each sampled kind and of the file, which are always included."""
        self._count: Counter[bytes] = Counter()
        self._bytes: Counter[bytes] = Counter()
        self._broken = 0

    def add(self, piece: bytes) -> None:
        """Select lines from ``piece``, the next complete lines of the file."""
        if not piece:
            return
        for start in {*self._even(piece), *self._broken_steps(piece), *self._facts(piece)}:
            self._lines[self._place + start] = _line_at(piece, start)
        for end in (*_SERIES, b""):
            if (at := piece.rfind(end, 0, len(piece) - 1)) >= 0:
                self._keep_last(end, piece, piece.rfind(b"\n", 0, at) + 1)
        self._place += len(piece)

    def chosen(self) -> list[bytes]:
        """Return the selected lines, in order."""
        return [line for _, line in sorted((self._lines | dict(self._last.values())).items())]

    def _even(self, piece: bytes) -> Iterator[int]:
        if self._every == 1:
            return (match.start() for match in re.finditer(b"^.", piece, re.MULTILINE))
        places = range(-self._place % self._every, len(piece), self._every)
        return (piece.rfind(b"\n", 0, place) + 1 for place in places)

    def _broken_steps(self, piece: bytes) -> Iterator[int]:
        place = piece.find(_BROKEN)
        while place >= 0 and self._broken < _MAX_BROKEN:
            self._broken += 1
            yield piece.rfind(b"\n", 0, place) + 1
            place = piece.find(_BROKEN, place + 1)

    def _facts(self, piece: bytes) -> Iterator[int]:
        """Yield the offsets of lines outside any series, including unknown lines."""
        for match in _FACT.finditer(b"\n" + piece, 0, len(piece)):
            start = match.start()
            tag = match[1] if match[1] in _TAGS else b"?"
            self._count[tag] += 1
            self._bytes[tag] += piece.index(b"\n", start) - start
            if self._count[tag] <= _MAX_EACH and self._bytes[tag] <= _MAX_EACH_BYTES:
                yield start
            else:
                self._keep_last(tag, piece, start)

    def _keep_last(self, kind: bytes, piece: bytes, start: int) -> None:
        self._last[kind] = self._place + start, _line_at(piece, start)


def _line_at(piece: bytes, start: int) -> bytes:
    return piece[start : piece.index(b"\n", start)]


def _tag(kind: type[Event]) -> bytes:
    return str(kind.__struct_config__.tag).encode()


_TAGS = frozenset(map(_tag, get_args(AnyEvent)))


_SERIES = tuple(_BEGINNING + _tag(kind) + b'"' for kind in SERIES)


_FACT = re.compile(
    b"\n(?!" + b"|".join(map(re.escape, _SERIES)) + b")(?:" + re.escape(_BEGINNING) + b'([^"\n]*)")?'
)
