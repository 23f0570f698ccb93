"""Records GPU and process once a second in ``telemetry.jsonl``."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

import psutil

from qlora_tui.files import open_append
from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.gpu.metrics_sampler import MetricsSampler
from qlora_tui.gpu.visible_devices import default_cuda_device
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import GPU_LOST
from qlora_tui.runs.telemetry import Reading, encode
from qlora_tui.training.health import GpuMonitor
from qlora_tui.training.reporter import Reporter

PERIOD_S = 1.0


class TelemetryRecorder:
    """Records from ``start`` to ``stop`` in a separate thread. A full disk costs samples and nothing else."""

    def __init__(self, run: RunDir, reporter: Reporter) -> None:
        self._reporter = reporter
        self._watch = GpuMonitor()
        self._path = run.telemetry_path
        self._process = psutil.Process()
        self._stopping = threading.Event()
        self._gpu: MetricsSampler | None = None
        self._thread = threading.Thread(target=self._sample_host, name="telemetry", daemon=True)

    def start(self, *, on_gpu: bool) -> None:
        """Start recording; with ``on_gpu`` the GPU too."""
        self._process.cpu_percent()
        if on_gpu:
            with suppress(GpuUnavailableError):
                self._gpu = MetricsSampler(default_cuda_device().index, self._on_reading, period_s=PERIOD_S)
                self._gpu.start()
                return
        self._thread.start()

    def stop(self) -> None:
        """Stop recording; no sample is written after this."""
        self._stopping.set()
        if self._gpu is not None:
            self._gpu.stop()
        if self._thread.is_alive():
            self._thread.join()

    def _sample_host(self) -> None:
        self._write(None)
        while not self._stopping.wait(PERIOD_S):
            self._write(None)

    def _on_reading(self, reading: GpuMetrics | GpuUnavailableError) -> None:
        if isinstance(reading, GpuUnavailableError):
            if reading.reason is GpuUnavailableReason.LOST:
                self._reporter.health(GPU_LOST, f"{reading.what} {reading.why}", reading.fix, error=True)
            self._write(None)
            return
        for finding in self._watch.check(reading, time.monotonic()):
            self._reporter.health(finding.kind, finding.evidence, finding.remedy)
        self._write(reading)

    def _write(self, reading: GpuMetrics | None) -> None:
        extra: dict[str, Any] = {"gpu": reading} if reading is not None else {}
        sample = Reading(
            at=time.time(),
            rss_bytes=self._process.memory_info().rss,
            cpu_percent=self._process.cpu_percent(),
            **extra,
        )
        with suppress(OSError), open_append(self._path) as file:
            file.write(encode(sample))
