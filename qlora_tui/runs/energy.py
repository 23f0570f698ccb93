"""The energy a run has used so far: the power in its telemetry, integrated over time."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui.decoding import UnixTime, decode_json
from qlora_tui.runs.event_log import next_data, read_from

JOULES_PER_KWH = 3.6e6
_CHUNK_BYTES = 1 << 20
MAX_CHUNKS = 24
MAX_SAMPLE_GAP_S = 10.0
"""A longer gap in seconds is a pause of the run, and counts as no energy."""


class _Power(Struct):
    power_w: float | None = None


class _Sample(Struct):
    """The fields of a telemetry line that energy needs, so that hours of it decode quickly."""

    at: UnixTime
    gpu: _Power | None = None


_decoder = msgspec.json.Decoder(_Sample)


class EnergyMeter:
    """Incremental reader that continues where it stopped, so that reading every second is cheap."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._joules = 0.0
        self._before: tuple[float, float] | None = None
        self._has_power = False
        self._is_behind = True

    @property
    def kwh(self) -> float | None:
        """Energy in kWh; None if the GPU reported no power, and until the whole file has been read."""
        return self._joules / JOULES_PER_KWH if self._has_power and not self._is_behind else None

    def read(self) -> None:
        """Read new samples, a day of them at most, so that a call every second stays short."""
        self._is_behind = True
        for _ in range(MAX_CHUNKS):
            chunk = read_from(self._path, self._offset, _CHUNK_BYTES)
            end = chunk.rfind(b"\n") + 1
            if not end and len(chunk) == _CHUNK_BYTES:
                # A power cut left zeros: no line is so long.
                self._offset = next_data(self._path, self._offset + len(chunk))
                continue
            if not end:
                self._is_behind = False
                return
            self._offset += end
            for line in chunk[:end].splitlines():
                try:
                    self._add(decode_json(line, _decoder))
                except msgspec.MsgspecError:
                    continue

    def read_all(self) -> None:
        """Read all new samples, however long it takes."""
        self.read()
        while self._is_behind:
            self.read()

    def _add(self, sample: _Sample) -> None:
        power = sample.gpu.power_w if sample.gpu else None
        if power is None:
            self._before = None
            return
        if self._before is not None and 0 < sample.at - self._before[0] <= MAX_SAMPLE_GAP_S:
            # Trapezoid rule between two readings.
            self._joules += (sample.at - self._before[0]) * (power + self._before[1]) / 2
            self._has_power = True
        self._before = (sample.at, power)
