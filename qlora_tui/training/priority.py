"""Where the processor trains, it gives way to other programs of the user: first of all to who watches."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_NICENESS = 10
_SESSION = Path("/proc/self/autogroup")


def lower_priority() -> None:
    """Leave a core at once to whoever wants it; alone on the machine, a trainer loses nothing by it.

    Linux shares the processor out among sessions before it looks at the niceness within one (sched(7),
    "autogroup"), so the session takes it too, where this process leads it. Threads that are there already,
    such as the heartbeat, keep their turn.
    """
    os.nice(max(0, _NICENESS - os.nice(0)))
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            _SESSION.write_text(f"{_NICENESS}\n")
