"""Lets a run rest: its next micro-batch waits while the GPU exceeds the user's bounds.

Resting does not change results, because nothing is computed between two micro-batches.
"""

from __future__ import annotations

import threading
import time

from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.runs.holds import Bounds, Hold, hold_words
from qlora_tui.settings import LiveSettings
from qlora_tui.training.control_requests import ControlRequests
from qlora_tui.training.reporter import Reporter

LONGEST_S = 45.0
"""Seconds after which a rest ends in any case.

Even an idle GPU may exceed a bound, and other processes of the run are waiting.
"""
_LOOK_S = 1.0
_CURRENT_S = 5.0
"""Maximum age of a reading, in seconds. A GPU without a recent reading does not delay the run."""


class Rest:
    """Makes the training thread wait while readings of the GPU, from another thread, are too high."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Time spent in all rests."""
        self._settings = LiveSettings()
        self._bounds: dict[int, Bounds] = {}
        self._holds: dict[int, tuple[float, Hold | None]] = {}
        """When each GPU was last read, and why the run should rest, keyed by the GPU's number."""
        self._has_news = threading.Event()
        self._reported: set[str] = set()

    @property
    def hold(self) -> Hold | None:
        """Return why the run should rest; None if it should not."""
        since_s = time.monotonic() - _CURRENT_S
        holds = [hold for read_s, hold in list(self._holds.values()) if read_s >= since_s]
        return next(filter(None, holds), None)

    def read(self, reading: GpuMetrics, elapsed_s: float) -> None:
        """Receive a reading of one of the run's GPUs, and its time as returned by ``time.monotonic``."""
        settings = self._settings.read()
        hold = self._bounds.setdefault(reading.index, Bounds()).update(
            elapsed_s,
            temperature_c=reading.temperature_c,
            power_w=reading.power_w,
            max_temperature_c=settings.max_temperature_c,
            max_power_w=settings.max_power_w,
        )
        self._holds[reading.index] = elapsed_s, hold
        self._has_news.set()

    def take(self, reporter: Reporter, requests: ControlRequests) -> None:
        """Wait until the GPUs are below the bounds or the run is to end, but at most :data:`LONGEST_S`."""
        if self.hold is None:
            return
        started_at = time.perf_counter()
        while (hold := self.hold) is not None and time.perf_counter() - started_at < LONGEST_S:
            self._has_news.clear()
            self._report(hold, reporter)
            self._has_news.wait(_LOOK_S)
            requests.poll_if_alone()
            if requests.stop_kind() is not None:
                break
        reporter.hold(None)
        self.seconds += time.perf_counter() - started_at

    def _report(self, hold: Hold, reporter: Reporter) -> None:
        reporter.hold(hold)
        if hold.cause not in self._reported:
            self._reported.add(hold.cause)
            evidence = f"The GPU is {hold_words(hold)}."
            reporter.health(
                "resting", evidence, "The run rests between micro-batches until the GPU is below the limit."
            )
