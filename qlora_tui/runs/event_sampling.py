"""Fast reading of long runs: every event except steps, and an even sample of the steps.

A run of a million steps has events of 200 MB, which take seconds to decode and more memory than a screen
should use. Lists and graphs read such runs through :meth:`qlora_tui.runs.view.RunView.from_sample`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qlora_tui.runs.event_log import read_from
from qlora_tui.runs.events import AnyEvent, decode

_CHUNK_BYTES = 4 << 20
_READ_WHOLE_BYTES = 256 << 10
"""Files up to this size are read in full: they have few steps to skip."""
_MAX_BROKEN = 2000
"""Maximum number of steps without a finite loss that are kept in addition to the sample."""
_NOT_A_STEP = re.compile(rb'"event":"(?:[^s]|s[^t]|st[^e])')
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

    Steps whose loss is not finite, the last step and the last line are always included.
    """
    size = _end_of_lines(path)
    every = 1 if size <= _READ_WHOLE_BYTES else max(1, size // steps)
    events: list[AnyEvent] = []
    offset = broken = unknown = 0
    while offset < size:
        chunk = read_from(path, offset, min(_CHUNK_BYTES, size - offset))
        end = chunk.rfind(b"\n") + 1
        if not end:
            break
        chunk = chunk[:end]
        offset += end
        starts = _starts(chunk, every, last=offset >= size)
        if every > 1 and broken < _MAX_BROKEN:
            starts_of_broken = _lines_with(_BROKEN, chunk, _MAX_BROKEN - broken)
            broken += len(starts_of_broken)
            starts |= starts_of_broken
        for start in sorted(starts):
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


def _starts(chunk: bytes, every: int, *, last: bool) -> set[int]:
    """Offsets at which the chosen lines of a chunk of complete lines begin."""
    if every == 1:
        return {0, *(match.end() for match in re.finditer(b"\n", chunk[:-1]))}
    chosen = {chunk.rfind(b"\n", 0, place) + 1 for place in range(0, len(chunk), every)}
    chosen |= {chunk.rfind(b"\n", 0, match.start()) + 1 for match in _NOT_A_STEP.finditer(chunk)}
    if last:
        ends = (len(chunk) - 1, max(0, chunk.rfind(b'"event":"step"')))
        chosen |= {chunk.rfind(b"\n", 0, end) + 1 for end in ends}
    return chosen


def _lines_with(text: bytes, chunk: bytes, most: int) -> set[int]:
    starts: set[int] = set()
    place = chunk.find(text)
    while place >= 0 and len(starts) < most:
        starts.add(chunk.rfind(b"\n", 0, place) + 1)
        place = chunk.find(text, place + 1)
    return starts
