"""How fast this machine copies to its GPU and multiplies there: measured by ``doctor``, read by estimates.

One record per GPU, in ``transfer.json`` of the state directory. Nothing is assumed without a measurement.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui.decoding import UnixTime, decode_json
from qlora_tui.files import atomic_write
from qlora_tui.paths import state_dir

_MAX_BYTES = 1 << 20


class TransferSpeed(Struct, frozen=True, kw_only=True):
    """Measured speeds of one GPU in this machine."""

    at: UnixTime
    """Unix time of the measurement, in seconds."""
    bytes_per_s: float
    """Copies from pinned host memory to the GPU."""
    flops_per_s: float
    """Matrix products in the compute dtype, each with a weight that is dequantized from NF4 before."""


_DECODER = msgspec.json.Decoder(dict[str, TransferSpeed])


def record_file() -> Path:
    """Return the file with the measured speeds, by the name of the GPU."""
    return state_dir() / "transfer.json"


def record_speed(gpu: str, speed: TransferSpeed) -> None:
    """Replace the measurement of one GPU. Raises OSError."""
    speeds = dict(_load()) | {gpu: speed}
    atomic_write(record_file(), msgspec.json.encode(speeds))


def measured_speed(gpu: str) -> TransferSpeed | None:
    """Return what was measured on a GPU of this machine; None where nothing was."""
    return _load().get(gpu)


def _load() -> dict[str, TransferSpeed]:
    file = record_file()
    try:
        stat = file.stat()
    except OSError:
        return {}
    return _read(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1)
def _read(file: Path, modified_ns: int, size: int) -> dict[str, TransferSpeed]:
    """Read the file; cached until it changes. A damaged file counts as no measurement."""
    if size > _MAX_BYTES:
        return {}
    try:
        speeds = decode_json(file.read_bytes(), _DECODER)
    except (OSError, msgspec.MsgspecError):
        return {}
    return {gpu: each for gpu, each in speeds.items() if each.bytes_per_s > 0 and each.flops_per_s > 0}
