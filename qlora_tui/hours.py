"""Hours of the week, such as ``23:00-07:00, sat-sun``, and the clock that they refer to."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from itertools import pairwise
from pathlib import Path

_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_DAY_GROUPS = {"weekdays": range(5), "weekends": range(5, 7)}
_DAY_MINUTES = 24 * 60
_LONGEST_S = 8 * _DAY_MINUTES * 60.0
"""Open hours that last longer than this many seconds without a gap never end, because hours repeat every
week.
"""
_TIMES = re.compile(r"(?<![:\d])(\d{1,2})(?::(\d\d))?-(\d{1,2})(?::(\d\d))?(?![:\d])")
_LOCAL_ZONE = Path("/etc/localtime")


class Clock:
    """The machine's clock. Tests replace it."""

    def __init__(self) -> None:
        self._zone: tzinfo | None = None
        self._zone_file = (0, 0)
        """Modification time and inode of the file that the time zone was read from."""

    def now(self) -> float:
        """Return the Unix time in seconds, by a clock that may be set."""
        return time.time()

    def elapsed(self) -> float:
        """Return the seconds since an arbitrary moment, by a clock that is never set."""
        return time.monotonic()

    def zone(self) -> tzinfo | None:
        """Return the current time zone of this machine; None for the zone in which this process started.

        The C library reads the zone once per process, but a laptop may travel.
        """
        if os.environ.get("TZ"):
            return None
        with suppress(OSError, ValueError):
            found = _LOCAL_ZONE.stat()
            if (found.st_mtime_ns, found.st_ino) != self._zone_file:
                from zoneinfo import ZoneInfo  # takes milliseconds, which a start avoids

                with _LOCAL_ZONE.open("rb") as file:
                    self._zone = ZoneInfo.from_file(file)
                self._zone_file = (found.st_mtime_ns, found.st_ino)
            return self._zone
        return None


@dataclass(frozen=True)
class _Window:
    """A window of hours that begins on certain days of the week."""

    days: frozenset[int]
    """Days of the week; 0 is Monday."""
    start: int
    """Start in minutes after midnight of such a day."""
    end: int
    """End in minutes after the same midnight. Exceeds a day if the window ends on the next day."""


@dataclass(frozen=True)
class Hours:
    """Hours of the week by the local clock. Without windows, they are always open.

    On a day on which the clock changes, the same time can occur twice. A window then begins or ends at the
    first of the two.
    """

    text: str = ""
    """The hours as the user wrote them."""
    windows: tuple[_Window, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Hours:
        """Parse hours such as ``23:00-07:00, sat-sun``. Raises ValueError with a sentence."""
        parts = [part.strip() for part in text.lower().split(",")]
        if parts == [""]:
            return cls()
        windows = [_window(part) for part in parts]
        for part, after in pairwise(parts):
            if not _TIMES.search(part) and _TIMES.search(after) and after[:1].isalpha():
                raise ValueError(
                    f"{part}, {after} is ambiguous. Write `{part} {after}` if the hours apply to all of "
                    f"these days, or `{after}, {part}` if {part} is a whole day."
                )
        return cls(text.strip(), tuple(windows))

    def is_open(self, now: float, zone: tzinfo | None = None) -> bool:
        """Return whether the Unix time ``now`` is within these hours."""
        return self.opens_at(now, zone) <= now

    def opens_at(self, now: float, zone: tzinfo | None = None) -> float:
        """Return the Unix time at which these hours next open; ``now`` if they are open."""
        return max(now, next(self._spans(now, zone))[0])

    def closes_at(self, now: float, zone: tzinfo | None = None) -> float:
        """Return the Unix time at which the current or next open hours end; infinity if never."""
        return next(self._spans(now, zone))[1]

    def done_at(self, now: float, seconds: float, zone: tzinfo | None = None) -> float:
        """Return the Unix time at which ``seconds`` of open hours have passed."""
        for opens_at, closes_at in self._spans(now, zone):
            start = max(now, opens_at)
            if seconds <= closes_at - start:
                return start + seconds
            seconds -= closes_at - start
        raise AssertionError("hours repeat for ever")

    def _spans(self, now: float, zone: tzinfo | None) -> Iterator[tuple[float, float]]:
        """Yield start and end of the open hours that end after ``now``, in order and without overlaps."""
        if not self.windows:
            yield now, math.inf
            return
        opens_at = closes_at = -math.inf
        for start, end in self._single_spans(now, zone):
            if start <= closes_at:
                closes_at = max(closes_at, end)
                if closes_at - opens_at > _LONGEST_S:
                    yield opens_at, math.inf
                    return
                continue
            if closes_at > now:
                yield opens_at, closes_at
            opens_at, closes_at = start, end

    def _single_spans(self, now: float, zone: tzinfo | None) -> Iterator[tuple[float, float]]:
        """Yield start and end of each window, day by day. The first day is the one before ``now``."""
        midnight = datetime.fromtimestamp(now, zone).replace(
            hour=0, minute=0, second=0, microsecond=0, fold=0
        )
        day = midnight.replace(tzinfo=None) - timedelta(days=1)
        while True:
            windows = [window for window in self.windows if day.weekday() in window.days]
            moments = [
                tuple(
                    (day + timedelta(minutes=minutes)).replace(tzinfo=zone).timestamp()
                    for minutes in (window.start, window.end)
                )
                for window in windows
            ]
            yield from sorted((start, end) for start, end in moments if end > start)
            day += timedelta(days=1)


def _window(part: str) -> _Window:
    times = _TIMES.search(part)
    names = (part if times is None else part[: times.start()] + part[times.end() :]).split()
    if times is None and not names:
        raise ValueError("there is nothing between two commas")
    days = frozenset(day for name in names for day in _days(name)) or frozenset(range(7))
    if times is None:
        return _Window(days, 0, _DAY_MINUTES)
    start_hour, start_minute, end_hour, end_minute = (int(part or 0) for part in times.groups())
    start, end = 60 * start_hour + start_minute, 60 * end_hour + end_minute
    if max(start_minute, end_minute) > 59 or start >= _DAY_MINUTES or end > _DAY_MINUTES:
        raise ValueError(f"{times[0]} has a time that is not between 00:00 and 24:00")
    return _Window(days, start, end if end > start else end + _DAY_MINUTES)


def _days(name: str) -> range | list[int]:
    """Return the day numbers for ``weekends``, ``sat``, ``fri-mon`` and the like."""
    if name in _DAY_GROUPS:
        return _DAY_GROUPS[name]
    # Names of days may be shortened to three letters.
    ends = [
        number
        for end in name.split("-", 1)
        for number, day in enumerate(_DAYS)
        if len(end) >= 3 and day.startswith(end)
    ]
    if len(ends) != name.count("-") + 1:
        raise ValueError(f"{name} is neither a day (mon to sun) nor a time (23:00-07:00)")
    return [(ends[0] + number) % 7 for number in range((ends[-1] - ends[0]) % 7 + 1)]
