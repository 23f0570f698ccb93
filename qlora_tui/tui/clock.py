"""The current time for all screens: one place, so that a test can stop it."""

from __future__ import annotations

import time


def now() -> float:
    """Unix time, seconds."""
    return time.time()
