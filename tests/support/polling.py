"""Waiting for a condition, with a deadline, and what happens while the tested code waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

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


def while_it_sleeps(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call ``act`` where this thread would sleep; threads that earlier tests left sleep as they do."""
    thread, sleep = threading.current_thread(), time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: act() if threading.current_thread() is thread else sleep(s))
