"""Long-running work in a thread. It ends early if its worker is canceled or the user stops it with a key."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from textual.screen import Screen

from qlora_tui.remote.calls import current
from qlora_tui.worker import JobStopped

if TYPE_CHECKING:
    from qlora_tui.runs.directory import RunDir

T = TypeVar("T")
SLOW_ACTIONS = "slow actions"
"""Group of the workers of :func:`act_on_run`."""


async def run_stoppable(function: Callable[..., T], *arguments: Any) -> T:
    """Run ``function`` in a thread and return its result.

    ``function`` gets the keyword argument ``should_stop``, a function that returns True once this call is
    canceled. Without ``should_stop``, closing the app would cancel the worker but not the thread, and the app
    would wait until the thread ends.
    """
    stop = Event()
    try:
        return await asyncio.to_thread(function, *arguments, should_stop=stop.is_set)
    finally:
        stop.set()


def act_on_run(
    screen: Screen[Any], run: RunDir, act: Callable[[RunDir], T], then: Callable[[T], object]
) -> None:
    """Call ``act(run)``, then ``then`` with its result.

    For a run on another machine (``--host``) or on a cluster, a worker of ``screen`` makes both calls, with
    ``act`` in a thread, because such a call may be slow.
    """
    # Imported here because the first frame needs this module, but not the package ``runs``.
    from qlora_tui.runs.slurm_runs import is_on_cluster

    if current() is None and not is_on_cluster(run):
        then(act(run))
        return

    async def act_and_go_on() -> None:
        then(await asyncio.to_thread(act, run))

    screen.run_worker(act_and_go_on(), group=SLOW_ACTIONS)


class Measurement:
    """Long-running work that the user starts and stops with a key. At most one thread does it at a time."""

    def __init__(self, on_change: Callable[[], object] = lambda: None) -> None:
        """Create an idle measurement.

        ``on_change`` is called in the app's thread when :attr:`progress` changes.
        """
        self.progress = ""
        """Description of the progress; empty while no work is running."""
        self._on_change = on_change
        self._stop: Event | None = None

    def stop(self) -> bool:
        """Ask the running measurement to stop and return True; return False if no measurement is running."""
        if self._stop is None:
            return False
        self._stop.set()
        return True

    async def run(
        self, measure: Callable[[Callable[[str], None], Callable[[], bool]], T], start: str
    ) -> T | None:
        """Return the result of ``measure(say, should_stop)``; None if the measurement was stopped.

        Args:
            measure: Runs in a thread and reports its progress through ``say``. Raises JobStopped once
                ``should_stop`` returns True.
            start: The progress to show until the first report.
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
            # Closing the app cancels the worker but not the thread, and the app would wait until the thread
            # ends.
            stop.set()
            self._stop = None
            show("")
