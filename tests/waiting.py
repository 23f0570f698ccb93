"""Waiting for a condition, with a deadline: never a sleep for its own sake."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(what: Callable[[], T | None], *, seconds: float = 30.0, saying: str = "") -> T:
    """The first true value of ``what``; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for {saying or what}")
        pause.wait(0.02)
