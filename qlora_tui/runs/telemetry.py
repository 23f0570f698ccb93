"""Machine metrics during a run: one line of ``telemetry.jsonl`` per second, written by the trainer."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui.decoding import Count, UnixTime, try_json
from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.runs.event_log import JsonLinesTail, end_offset

JOULES_PER_KWH = 3.6e6
MAX_PIECES = 24
"""Maximum number of pieces of a file read in one call. At a megabyte each, they hold a day of samples."""
MAX_SAMPLE_GAP_S = 10.0
"""Seconds above which a gap between samples is a pause of the run, and adds no energy."""
_RECENT_BYTES = 256 << 10


class Reading(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sample of GPU and process metrics."""

    at: UnixTime
    """Unix time in seconds."""
    rss_bytes: Count
    """Resident memory of the trainer process."""
    cpu_percent: float
    """CPU usage in percent of one core: 200 means two busy cores."""
    machine_cpu_percent: float | None = None
    """CPU usage of all programs in percent of one core; None in files of earlier versions."""
    gpu: GpuMetrics | None = None
    """GPU metrics; None on a machine without a GPU."""
    other_gpus: tuple[GpuMetrics, ...] = ()
    """Metrics of the additional GPUs of a run on several GPUs."""

    @property
    def gpus(self) -> tuple[GpuMetrics, ...]:
        """Metrics of every GPU of the run that reports metrics."""
        return self.other_gpus if self.gpu is None else (self.gpu, *self.other_gpus)


_READINGS = msgspec.json.Decoder(Reading)


def encode(sample: Reading) -> bytes:
    """Encode a sample as one line, including the newline."""
    return msgspec.json.encode(sample) + b"\n"


class TelemetryTail(JsonLinesTail[Reading]):
    """Samples of a run, beginning with those of the last minutes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, partial(try_json, decoder=_READINGS), end_offset(path, _RECENT_BYTES))


class _Power(Struct):
    power_w: float | None = None


class _Sample(Struct):
    """The fields of a telemetry line that the energy depends on. Decoding only these saves time."""

    at: UnixTime
    gpu: _Power | None = None
    other_gpus: tuple[_Power, ...] = ()


_SAMPLES = msgspec.json.Decoder(_Sample)


class EnergyMeter:
    """Energy that a run's GPUs have used so far, integrated from the power in its telemetry."""

    def __init__(self, path: Path) -> None:
        self._tail = JsonLinesTail(path, partial(try_json, decoder=_SAMPLES))
        self._joules = 0.0
        self._before: tuple[float, float] | None = None
        self._has_power = False
        self._is_behind = True

    @property
    def kwh(self) -> float | None:
        """Energy in kWh; None if the GPU reported no power, or until the whole file has been read."""
        return self._joules / JOULES_PER_KWH if self._has_power and not self._is_behind else None

    def read(self) -> None:
        """Read new samples, at most a day of them, so that a call every second stays short."""
        pieces = 0
        for samples in islice(self._tail.pieces(), MAX_PIECES):
            pieces += 1
            for sample in samples:
                self._add(sample)
        self._is_behind = pieces == MAX_PIECES

    def read_all(self) -> None:
        """Read all new samples, however long it takes."""
        self.read()
        while self._is_behind:
            self.read()

    def _add(self, sample: _Sample) -> None:
        if sample.gpu is None or sample.gpu.power_w is None:
            self._before = None
            return
        power = sample.gpu.power_w + sum(gpu.power_w or 0.0 for gpu in sample.other_gpus)
        if self._before is not None and 0 < sample.at - self._before[0] <= MAX_SAMPLE_GAP_S:
            # Trapezoidal rule between two readings.
            self._joules += (sample.at - self._before[0]) * (power + self._before[1]) / 2
            self._has_power = True
        self._before = (sample.at, power)
