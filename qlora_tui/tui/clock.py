"""The current time for all screens, in one place so that tests can freeze it."""

from __future__ import annotations

import time


def now() -> float:
    """Return the current Unix time in seconds."""
    return time.time()
