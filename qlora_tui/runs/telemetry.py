"""Machine metrics during a run: one line of ``telemetry.jsonl`` a second, written by the trainer."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui.decoding import Count, UnixTime, decode_json
from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.runs.event_log import read_from


class Reading(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sample of GPU and process metrics."""

    at: UnixTime
    """Unix time, seconds."""
    rss_bytes: Count
    """Resident memory of the trainer process."""
    cpu_percent: float
    """CPU usage in percent of one core: 200 is two busy cores."""
    gpu: GpuMetrics | None = None
    """GPU metrics; None on a machine without a GPU."""


_decoder = msgspec.json.Decoder(Reading)


def encode(sample: Reading) -> bytes:
    """Encode a sample as one line, newline included."""
    return msgspec.json.encode(sample) + b"\n"


class TelemetryTail:
    """Reads samples from where it stopped; the first call reads only the last ``max_bytes``."""

    def __init__(self, path: Path, max_bytes: int = 256 * 1024) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._offset: int | None = None

    def poll(self) -> list[Reading]:
        """Return new samples, oldest first; torn and unknown lines are skipped."""
        if self._offset is None:
            size = self._path.stat().st_size if self._path.exists() else 0
            self._offset = max(0, size - self._max_bytes)
        chunk = read_from(self._path, self._offset, self._max_bytes * 4)
        end = chunk.rfind(b"\n") + 1
        self._offset += end
        samples = []
        for line in chunk[:end].splitlines():
            try:
                samples.append(decode_json(line, _decoder))
            except msgspec.MsgspecError:
                continue
        return samples
