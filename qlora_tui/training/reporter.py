"""Everything that the trainer reports: events, status, heartbeat, log lines, and telemetry once a second.

A full disk must not end a run that has trained for hours: events that cannot be written are kept, and writing
them is tried again with the next event. Only the main process of a run reports.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import msgspec
import psutil

from qlora_tui.errors import EXIT_FAILURE
from qlora_tui.files import open_append
from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.gpu.metrics import GpuDevice, GpuMetrics
from qlora_tui.gpu.nvml import MetricsSampler
from qlora_tui.gpu.visible_devices import visible_gpus
from qlora_tui.runs.devices import RunDevice
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import GPU_LOST, AnyEvent, Health, Phase, PhaseChanged, Progress, phase_label
from qlora_tui.runs.holds import Hold
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import HEARTBEAT_S, read_status, write_heartbeat, write_status
from qlora_tui.runs.telemetry import Reading, encode
from qlora_tui.training.health import GpuMonitor

_BEATS_TO_BELIEVE = 3
"""Number of consecutive heartbeats at which the run's files must be missing before the trainer ends.

A network file system may be unreachable for a moment.
"""
_PROGRESS_S = 0.5
"""Minimum time between two Progress events, in seconds, except for the last event of a phase."""


class Reporter:
    """Writes events, status and log of one trainer. Every method may be called from any thread."""

    def __init__(self, run: RunDir, *, mute: bool = False) -> None:
        self._run = run
        self.is_mute = mute
        self._lock = threading.Lock()
        self.observer: Callable[[AnyEvent], None] = lambda event: None
        """Called with each event in the thread that reports it, after the attempt to write it."""
        self._writer: EventWriter | None = None
        self._unwritten: list[AnyEvent] = []
        self._status = read_status(run).transition("running", process=process_identity())
        self._is_in_status = False
        """Whether ``status.json`` names this process."""
        self._progress_at = 0.0
        self._disk = run.path.parent.stat().st_dev
        self._missing_beats = 0
        self._stopping = threading.Event()
        self._heartbeat_thread = threading.Thread(target=self._heartbeat_loop, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Write the status, and from then on a heartbeat every second."""
        self.write_heartbeat()
        if not self.is_mute:
            self._heartbeat_thread.start()

    def stop(self) -> None:
        """Stop the heartbeat, and try once more to write the events that are still waiting."""
        self._stopping.set()
        if self._heartbeat_thread.is_alive():
            self._heartbeat_thread.join()
        with self._lock:
            self._flush()
            if self._writer is not None:
                self._writer.close()

    def emit(self, event: AnyEvent) -> None:
        """Write an event. An event that ends the run is flushed to disk."""
        if self.is_mute:
            return
        with self._lock:
            self._unwritten.append(event)
            self._flush()
        self.observer(event)

    def phase(self, phase: Phase, detail: str = "") -> None:
        """Report that a phase begins."""
        self.log(f"{phase_label(phase)}{': ' if detail else ''}{detail}")
        self.emit(PhaseChanged(phase=phase, detail=detail))
        self.update(phase=phase)

    def progress(self, phase: Phase, done: int, total: int) -> None:
        """Report the progress of a phase, at most once every ``_PROGRESS_S`` seconds and at the end."""
        now = time.monotonic()
        if now - self._progress_at >= _PROGRESS_S or done == total:
            self._progress_at = now
            self.emit(Progress(phase=phase, done=done, total=total))

    def health(self, kind: str, evidence: str, remedy: str, *, step: int = 0, error: bool = False) -> None:
        """Report a problem or an unusual observation, with evidence and remedy."""
        self.log(f"{kind}: {evidence} {remedy}")
        self.emit(
            Health(
                kind=kind,
                severity="error" if error else "warning",
                evidence=evidence,
                remedy=remedy,
                step=step,
            )
        )

    def resume_from(self, step: int) -> None:
        """Set the step that the attempt starts from; 0 for the beginning."""
        with self._lock:
            status = self._status
            # The loss of an earlier step is in the events.
            loss = status.loss if step == status.step else None
            self._status = msgspec.structs.replace(status, step=step, loss=loss)
        self.write_heartbeat()

    def update(
        self,
        *,
        phase: Phase | None = None,
        step: int | None = None,
        total_steps: int | None = None,
        loss: float | None = None,
        micro_batch: int | None = None,
        micro_batches: int | None = None,
    ) -> None:
        """Change the status that the next heartbeat writes."""
        given = {
            "phase": phase,
            "step": step,
            "total_steps": total_steps,
            "loss": loss,
            "micro_batch": micro_batch,
            "micro_batches": micro_batches,
        }
        with self._lock:
            self._status = msgspec.structs.replace(
                self._status, **{key: value for key, value in given.items() if value is not None}
            )

    def hold(self, hold: Hold | None) -> None:
        """Make the next heartbeats say why the run rests; None if it does not rest."""
        with self._lock:
            self._status = msgspec.structs.replace(self._status, hold=hold)

    def log(self, line: str) -> None:
        """Append a line to the trainer's log."""
        if not self.is_mute:
            # The log may be on a full disk too.
            with suppress(OSError):
                print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)

    def _flush(self) -> None:
        while self._unwritten:
            try:
                if self._writer is None:
                    self._writer = EventWriter(self._run.events_path)
                self._writer.append(self._unwritten[0])
            except OSError:
                # A new writer repairs the incomplete line that may have been left.
                if self._writer is not None:
                    self._writer.close()
                self._writer = None
                return
            self._unwritten.pop(0)

    def write_heartbeat(self) -> None:
        """Write the heartbeat; the first one also names this process in ``status.json``.

        If a full disk rejects a write, the next heartbeat repeats it.
        """
        if self.is_mute:
            return
        with self._lock:
            status = msgspec.structs.replace(self._status, at=time.time())
        self._missing_beats = self._missing_beats + 1 if self._is_deleted() else 0
        if self._missing_beats:
            # Writing now would create a folder that is not a complete run.
            return
        with suppress(OSError):
            if not self._is_in_status:
                write_status(self._run, status)
                self._is_in_status = True
            write_heartbeat(self._run, status)

    def _heartbeat_loop(self) -> None:
        while not self._stopping.wait(HEARTBEAT_S):
            self.write_heartbeat()
            if self._missing_beats >= _BEATS_TO_BELIEVE:
                self._end_without_run()

    def _is_deleted(self) -> bool:
        """Return whether the run's files were deleted. False if their disk was disconnected instead."""
        try:
            return self._run.is_deleted and self._run.path.parent.stat().st_dev == self._disk
        except OSError:
            return False

    def _end_without_run(self) -> None:
        """End this process, because its run was deleted; only the log can report this."""
        self.log(f"{self._run.path} was deleted during training: the trainer exits.")
        # Files written after the recipe was deleted have kept the folder from being removed.
        with suppress(OSError):
            for path in (self._run.heartbeat_path, self._run.telemetry_path, self._run.status_path):
                path.unlink(missing_ok=True)
            self._run.path.rmdir()
        os._exit(EXIT_FAILURE)


PERIOD_S = 1.0


class QuietReporter(Reporter):
    """Writes no files; passes descriptions of the current work to a callback."""

    def __init__(self, run: RunDir, say: Callable[[str], object]) -> None:
        super().__init__(run, mute=True)
        self._say = say

    def phase(self, phase: Phase, detail: str = "") -> None:
        self._say(f"{phase_label(phase)}{': ' if detail else ''}{detail}")


class TelemetryRecorder:
    """Records telemetry from ``start`` to ``stop`` in separate threads.

    If the disk is full, only samples are lost.
    """

    def __init__(
        self,
        run: RunDir,
        reporter: Reporter,
        on_reading: Callable[[GpuMetrics, float], None] = lambda reading, elapsed_s: None,
    ) -> None:
        """Record the telemetry of ``run``.

        ``on_reading`` is called with each reading of a GPU of the run and the reading's ``time.monotonic``
        time, in the thread that reads this GPU.
        """
        self._reporter = reporter
        self._notice = on_reading
        self._path = run.telemetry_path
        self._process = psutil.Process()
        self._stopping = threading.Event()
        self._gpus: list[MetricsSampler] = []
        self._thread = threading.Thread(target=self._sample_host, name="telemetry", daemon=True)

    def start(self, *, gpus: int) -> None:
        """Start recording the first ``gpus`` GPUs, which are the GPUs of the run."""
        self._process.cpu_percent()
        psutil.cpu_percent()
        devices: list[GpuDevice] = []
        with suppress(GpuUnavailableError):
            devices = visible_gpus()[:gpus] if gpus else []
        for device in devices:
            name = str(RunDevice.of_gpu(device)) if len(devices) > 1 else "The GPU"
            on_reading = partial(self._on_reading, GpuMonitor(name), is_first=not self._gpus)
            self._gpus.append(MetricsSampler(device.index, on_reading, period_s=PERIOD_S))
        for sampler in reversed(self._gpus):
            sampler.start()
        if not devices:
            self._thread.start()

    def stop(self) -> None:
        """Stop recording; no sample is written after this."""
        self._stopping.set()
        for sampler in self._gpus:
            sampler.stop()
        if self._thread.is_alive():
            self._thread.join()

    def _sample_host(self) -> None:
        self._write(None)
        while not self._stopping.wait(PERIOD_S):
            self._write(None)

    def _on_reading(
        self, monitor: GpuMonitor, reading: GpuMetrics | GpuUnavailableError, *, is_first: bool
    ) -> None:
        """Check a reading. Readings of the first GPU are written, each with the others' last readings."""
        if isinstance(reading, GpuUnavailableError):
            if reading.reason is GpuUnavailableReason.LOST:
                self._reporter.health(GPU_LOST, f"{reading.what} {reading.why}", reading.fix, error=True)
        else:
            elapsed_s = time.monotonic()
            self._notice(reading, elapsed_s)
            for finding in monitor.check(reading, elapsed_s):
                self._reporter.health(finding.kind, finding.evidence, finding.remedy)
        if is_first:
            self._write(None if isinstance(reading, GpuUnavailableError) else reading)

    def _write(self, reading: GpuMetrics | None) -> None:
        others = [sampler.latest for sampler in self._gpus[1:]]
        sample = Reading(
            at=time.time(),
            rss_bytes=self._process.memory_info().rss,
            cpu_percent=self._process.cpu_percent(),
            machine_cpu_percent=psutil.cpu_percent() * (os.cpu_count() or 1),
            gpu=reading,
            other_gpus=tuple(each for each in others if isinstance(each, GpuMetrics)),
        )
        with suppress(OSError), open_append(self._path) as file:
            file.write(encode(sample))
