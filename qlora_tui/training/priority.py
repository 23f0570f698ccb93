"""Lowers the priority of a trainer on the CPU below other programs of the user, above all the app."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_NICENESS = 10
_SESSION = Path("/proc/self/autogroup")


def lower_priority() -> None:
    """Make other programs run first; alone on the machine, a trainer loses nothing.

    Linux divides the CPU among sessions before it considers niceness within one (sched(7), "autogroup"). So
    the session gets the niceness too, where this process leads it. Threads that exist already, such as the
    heartbeat, keep their priority.
    """
    os.nice(max(0, _NICENESS - os.nice(0)))
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            _SESSION.write_text(f"{_NICENESS}\n")
