"""Waiting for a condition, with a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(what: Callable[[], T | None], *, seconds: float = 60.0, saying: str = "") -> T:
    """The first true value of ``what``; fails when there is none in time.

    The time is a guard against waiting for ever, not a budget: on a loaded machine all takes longer.
    """
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for {saying or what}")
        pause.wait(0.02)
