"""Fast reading of long runs: every fact, and an even sample of what a run has as much of as steps.

A run of a million steps has events of 200 MB, which take seconds to decode and more memory than a screen
should use. Lists and graphs read such runs through :meth:`qlora_tui.runs.view.RunView.from_sample`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from msgspec import Struct

from qlora_tui.runs.event_log import LONGEST_LINE_BYTES, next_data, read_from
from qlora_tui.runs.events import SERIES, AnyEvent, decode

_CHUNK_BYTES = LONGEST_LINE_BYTES
_READ_WHOLE_BYTES = 256 << 10
"""Files up to this size are read in full: they have few steps to skip."""
_MAX_BROKEN = 2000
"""Maximum number of steps without a finite loss that are kept in addition to the sample."""
_MAX_EACH = 16_384
_MAX_EACH_BYTES = 16 << 20
"""Most events of one kind that are read whole. What a file has more of is sampled as steps are, so that
reading takes bounded memory, whatever is in it."""
_BEGINNING = b'{"event":"'
_BROKEN = b'"loss":null'


@dataclass(frozen=True)
class SampledEvents:
    """The events sampled from a run."""

    events: list[AnyEvent]
    end: int
    """Offset in the file up to which they were read, in bytes."""
    unknown: int
    """Number of sampled lines that this version does not understand."""


def sample_events(path: Path, steps: int) -> SampledEvents:
    """Return the events of a run in order, with about ``steps`` of its steps.

    Steps whose loss is not finite, the last step and the last line are always included, and so is every event
    that is not one of a series.
    """
    size = _end_of_lines(path)
    sampler = _Sampler(1 if size <= _READ_WHOLE_BYTES else max(1, size // steps))
    events: list[AnyEvent] = []
    offset = unknown = 0
    is_skipping = False
    while offset < size:
        chunk = read_from(path, offset, min(_CHUNK_BYTES, size - offset))
        end = chunk.rfind(b"\n") + 1
        if not end:
            # Longer than any event; a power cut may have left terabytes of nothing.
            is_skipping = True
            offset = next_data(path, offset + len(chunk)) if chunk else size
            continue
        begin = 0
        if is_skipping:
            begin, is_skipping = chunk.index(b"\n") + 1, False
            unknown += 1
        offset += end
        chunk = chunk[begin:end]
        for start in sorted(sampler.starts(chunk, is_last=offset >= size)) if chunk else ():
            event = decode(chunk[start : chunk.index(b"\n", start)])
            if event is None:
                unknown += 1
            else:
                events.append(event)
    return SampledEvents(events, offset, unknown)


def _end_of_lines(path: Path) -> int:
    """Number of bytes up to the last complete line: what follows is torn, or being written."""
    size = path.stat().st_size if path.exists() else 0
    start = max(0, size - _READ_WHOLE_BYTES)
    return start + read_from(path, start, size - start).rfind(b"\n") + 1


class _Sampler:
    """Chooses lines of a file, chunk by chunk."""

    def __init__(self, every: int) -> None:
        self._every = every
        """Distance in bytes between two lines of the even sample; 1 for all lines."""
        self._series = set(_STEP_TAGS)
        self._count: Counter[bytes] = Counter()
        self._bytes: Counter[bytes] = Counter()
        self._broken = 0

    def starts(self, chunk: bytes, *, is_last: bool) -> set[int]:
        """Offsets at which the chosen lines of a chunk of complete lines begin."""
        if self._every == 1:
            return {0, *(match.end() for match in re.finditer(b"\n", chunk[:-1]))}
        chosen = {chunk.rfind(b"\n", 0, place) + 1 for place in range(0, len(chunk), self._every)}
        chosen |= self._facts(chunk) | self._broken_steps(chunk)
        for tag in self._series:
            # The last of a series is a fact too. Only that of the last chunk is wanted of steps, and of other
            # kinds it is not known which chunk that is.
            if tag and (is_last or tag not in _STEP_TAGS):
                place = chunk.rfind(_BEGINNING + tag + b'"')
                chosen |= {chunk.rfind(b"\n", 0, place) + 1} if place >= 0 else set()
        return chosen | ({chunk.rfind(b"\n", 0, len(chunk) - 1) + 1} if is_last else set())

    def _facts(self, chunk: bytes) -> set[int]:
        """Every line that is not one of a series, even where this version does not know what it is."""
        facts: set[int] = set()
        for start in self._candidates(chunk):
            tag = b""
            if chunk.startswith(_BEGINNING, start):
                tag = chunk[start + len(_BEGINNING) : chunk.find(b'"', start + len(_BEGINNING))]
            tag = tag if tag in _TAGS else b""
            self._count[tag] += 1
            self._bytes[tag] += chunk.index(b"\n", start) - start
            if self._count[tag] <= _MAX_EACH and self._bytes[tag] <= _MAX_EACH_BYTES:
                facts.add(start)
            else:
                self._series.add(tag)
        return facts

    def _candidates(self, chunk: bytes) -> Iterator[int]:
        """Offsets of lines that do not begin as one of a series does."""
        if b"" in self._series:
            # So many lines are unknown that only the known ones are looked for.
            line = re.compile(re.escape(_BEGINNING) + _one_of(_TAGS - self._series) + b'"')
        else:
            line = re.compile(b"(?!" + re.escape(_BEGINNING) + _one_of(self._series) + b'")')
        if line.match(chunk):
            yield 0
        yield from (match.end(1) for match in re.finditer(b"(\n)" + line.pattern, chunk[:-1]))

    def _broken_steps(self, chunk: bytes) -> set[int]:
        starts: set[int] = set()
        place = chunk.find(_BROKEN)
        while place >= 0 and self._broken < _MAX_BROKEN:
            starts.add(chunk.rfind(b"\n", 0, place) + 1)
            self._broken += 1
            place = chunk.find(_BROKEN, place + 1)
        return starts


def _one_of(tags: Set[bytes]) -> bytes:
    return b"(?:" + b"|".join(map(re.escape, sorted(tags))) + b")"


def _tags(kinds: Iterable[type[Struct]]) -> frozenset[bytes]:
    return frozenset(str(kind.__struct_config__.tag).encode() for kind in kinds)


_TAGS = _tags(get_args(AnyEvent))
_STEP_TAGS = _tags(SERIES)
