"""``MetricsSampler``: a thread that reads one GPU every second and reports the metrics.

The trainer writes them to ``telemetry.jsonl``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec

from qlora_tui.gpu.driver import GpuDriver, open_driver
from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.metrics import GpuMetrics, GpuProcess

PROCESSES_EVERY_S = 5.0
"""Process lists cost 4.5 ms and a driver lock, everything else together well under one millisecond."""

log = logging.getLogger(__name__)


class MetricsSampler:
    """Reads GPU ``index`` until stopped.

    ``on_sample`` is called in the sampler's thread: with every reading, and once with a
    ``GpuUnavailableError`` whenever the GPU becomes unavailable or the reason changes. The driver is then
    reopened every ``retry_s`` until the GPU responds again. An exception in ``on_sample`` is logged and does
    not stop the sampler.
    """

    def __init__(
        self,
        index: int,
        on_sample: Callable[[GpuMetrics | GpuUnavailableError], None],
        *,
        period_s: float = 1.0,
        retry_s: float = 10.0,
    ):
        self.latest: GpuMetrics | GpuUnavailableError | None = None
        """The last sample; ``None`` before the first."""
        self._index = index
        self._on_sample = on_sample
        self._period_s = period_s
        self._retry_s = retry_s
        self._callback_fails = False
        self._stopping = threading.Event()
        # A daemon: a driver that hangs in a call must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="gpu-sampler", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Take the first reading now, in the thread. A sampler starts once."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop, and wait until no more calls of ``on_sample`` can come, at most ``timeout_s`` seconds.

        May be called twice, before the start, and from ``on_sample`` itself.
        """
        self._stopping.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with open_driver() as driver:
                    self._read_until_stopped(driver)
            except GpuUnavailableError as unavailable:
                if not (
                    isinstance(self.latest, GpuUnavailableError) and self.latest.reason is unavailable.reason
                ):
                    self._deliver(unavailable)
                self._stopping.wait(self._retry_s)

    def _read_until_stopped(self, driver: GpuDriver) -> None:
        """Read until stopped, or until ``GpuUnavailableError`` is raised."""
        due_s = processes_due_s = time.monotonic()
        processes: tuple[GpuProcess, ...] | None = None
        while not self._stopping.is_set():
            if time.monotonic() >= processes_due_s:
                processes_due_s += PROCESSES_EVERY_S
                reading = driver.read(self._index, processes=True)
                processes = reading.processes
            else:
                reading = msgspec.structs.replace(driver.read(self._index), processes=processes)
            self._deliver(reading)
            now_s = time.monotonic()
            due_s += self._period_s
            if due_s < now_s:  # Late by a period or more: skip the missed samples.
                due_s = now_s + self._period_s
            self._stopping.wait(due_s - now_s)

    def _deliver(self, sample: GpuMetrics | GpuUnavailableError) -> None:
        self.latest = sample
        try:
            self._on_sample(sample)
        except Exception:
            if not self._callback_fails:  # A full disk would fail each second; once is enough.
                log.exception("the callback failed on a GPU sample")
            self._callback_fails = True
        else:
            self._callback_fails = False
