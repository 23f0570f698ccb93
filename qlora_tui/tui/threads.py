"""Long work in a thread that ends with the worker that waits for it, or when a key stops it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import Event
from typing import Any, TypeVar

from qlora_tui.worker import JobStopped

T = TypeVar("T")


async def run_stoppable(function: Callable[..., T], *arguments: Any) -> T:
    """Run ``function`` in a thread, and return its result.

    Its argument ``should_stop`` returns true once this call is canceled: leaving the app cancels a worker,
    but not its thread, for whose end the app would wait.
    """
    stop = Event()
    try:
        return await asyncio.to_thread(function, *arguments, should_stop=stop.is_set)
    finally:
        stop.set()


class Measurement:
    """Long work in a thread that a key starts and stops; one at a time."""

    def __init__(self, on_change: Callable[[], object] = lambda: None) -> None:
        """``on_change``: called in the app's thread when :attr:`progress` has changed."""
        self.progress = ""
        """How far it is; empty while there is none."""
        self._on_change = on_change
        self._stop: Event | None = None

    def stop(self) -> bool:
        """Stop it. Return whether there was one."""
        if self._stop is None:
            return False
        self._stop.set()
        return True

    async def run(
        self, measure: Callable[[Callable[[str], None], Callable[[], bool]], T], start: str
    ) -> T | None:
        """Return the result of ``measure(say, should_stop)``; None if it was stopped.

        Args:
            measure: Runs in a thread, and says how far it is. It ends by JobStopped once it should stop.
            start: What is said until then.
        """
        self._stop = stop = Event()
        loop = asyncio.get_running_loop()

        def show(progress: str) -> None:
            if self._stop is stop or not progress:
                self.progress = progress
                self._on_change()

        def say(progress: str) -> None:
            loop.call_soon_threadsafe(show, progress)

        show(start)
        try:
            return await asyncio.to_thread(measure, say, stop.is_set)
        except JobStopped:
            return None
        finally:
            # Leaving the app cancels a worker, but not its thread, for whose end the app would wait.
            stop.set()
            self._stop = None
            show("")
