"""Records measured and predicted memory of past runs, and computes this machine's correction from them.

A record is one line of JSON in ``memory.jsonl`` in the state directory. The trainer calls :func:`record_run`
when a run ends, unless the estimate does not model the run exactly, or the run never reached its longest
batch. :func:`correction_for` returns the correction for every estimate on this machine, with the number of
runs.

Two values are fitted separately, because they scale differently. On a GPU, the memory that torch's allocator
reserves grows with the tensors, so its correction is a factor. The rest of the process, the CUDA context, is
the same for every recipe, so its correction is in bytes. A CPU run measures only the largest resident set,
which mixes tensors, heap and libraries: it gives no allocated or reserved bytes, and no information on any
GPU. On a CPU, the whole difference between measurement and prediction is attributed to the libraries, in
bytes, so that a tiny run does not distort the estimate of a large one.

``doctor`` measures the speed of copies to the GPU and of matrix products on it, and stores them in
``transfer.json``, which has one record per GPU. Without a measurement, the estimate does not say how much
copies slow down a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median

import msgspec
from msgspec import Struct

from qlora_tui.decoding import Count, UnixTime, read_json, try_json
from qlora_tui.files import atomic_write
from qlora_tui.paths import state_dir

MIN_RUNS = 2
"""Minimum number of runs for a correction: the result of a single run could be accidental."""
MAX_RUNS = 20
"""Maximum number of runs that a correction uses.

These are the latest runs, because drivers and libraries may have changed since earlier ones.
"""
MIN_FACTOR, MAX_FACTOR = 0.8, 1.5
"""Range of the factor; values outside mean that something else is wrong."""


class MeasuredRun(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Predicted and measured peaks of one run, in bytes.

    The predictions are uncorrected, for the longest batch of the run.
    """

    at: UnixTime
    """Unix time, in seconds."""
    machine: str
    """Name of the GPU or the CPU."""
    driver: str = ""
    versions: dict[str, str] = {}
    """Versions of torch and related libraries."""
    model_type: str = ""
    ran_out: bool = False
    """Whether the run ran out of memory; the measured bytes are then its peak before the failure."""
    own_process: bool = False
    """Whether the process did only the run's work.

    In records without this field, the first run on a GGUF file also converted the file in the trainer's
    process, and ``measured_process_bytes`` includes the peak of the conversion.
    """
    counts_gaps: bool = False
    """Whether the prediction for a CPU run counts the gaps in the heap between kept layer inputs.

    In older records these gaps are part of the difference between measurement and prediction.
    """
    managed_bytes: Count = 0
    """Predicted bytes of a paged optimizer's states.

    They are outside torch's pool, and can be on the GPU or in host memory.
    """
    predicted_allocated_bytes: Count
    predicted_reserved_bytes: Count
    predicted_process_bytes: Count
    measured_allocated_bytes: Count = 0
    """Peak of allocated bytes; 0 on a CPU, like ``measured_reserved_bytes``."""
    measured_reserved_bytes: Count = 0
    measured_process_bytes: Count

    @property
    def outside_bytes(self) -> int:
        """Return the process bytes outside torch's pool; on a CPU, outside the predicted reserved level."""
        pool = self.measured_reserved_bytes or self.predicted_reserved_bytes
        return max(0, self.measured_process_bytes - pool)


@dataclass(frozen=True)
class Correction:
    """Correction of a machine's estimates by its past runs."""

    runs: int
    factor: float = 1.0
    """Factor for the reserved level."""
    outside_bytes: int | None = None
    """Bytes of the process outside the reserved level.

    None if unknown, for example because all runs used a paged optimizer.
    """
    low: float = 1.0
    """Smallest ratio of the measured bytes to the corrected prediction among the runs."""
    high: float = 1.0

    @property
    def applies(self) -> bool:
        """Return whether there are enough runs."""
        return self.runs >= MIN_RUNS


def correction_for(machine: str) -> Correction | None:
    """Compute the correction from the latest runs on ``machine``; None if there are none."""
    runs = [run for run in load_runs() if run.machine == machine and _is_usable(run)][-MAX_RUNS:]
    if not runs:
        return None
    if len(runs) < MIN_RUNS:
        return Correction(len(runs))
    ratios = [
        run.measured_reserved_bytes / run.predicted_reserved_bytes
        for run in runs
        if run.measured_reserved_bytes
    ]
    factor = min(max(median(ratios), MIN_FACTOR), MAX_FACTOR) if ratios else 1.0
    beside = [run.outside_bytes for run in runs if not run.managed_bytes]
    outside = int(median(beside)) if beside else None
    spread = [run.measured_process_bytes / _corrected_bytes(run, factor, outside) for run in runs]
    return Correction(len(runs), factor, outside, min(spread), max(spread))


def _is_usable(run: MeasuredRun) -> bool:
    # On a GPU conversions and gaps leave no trace; on a CPU they cannot be separated from the run.
    if not (run.measured_reserved_bytes or (run.own_process and run.counts_gaps)):
        return False
    return run.measured_process_bytes > 0 and 0 < run.predicted_reserved_bytes <= run.predicted_process_bytes


def _corrected_bytes(run: MeasuredRun, factor: float, outside: int | None) -> float:
    if outside is None:
        outside = run.predicted_process_bytes - run.predicted_reserved_bytes - run.managed_bytes
    return run.predicted_reserved_bytes * factor + outside + run.managed_bytes


def record_file() -> Path:
    """Return the file with the recorded runs."""
    return state_dir() / "memory.jsonl"


def record_run(peaks: MeasuredRun) -> None:
    """Append one run. Raises OSError."""
    with record_file().open("ab") as out:
        # A line truncated by a full disk must not damage the new line.
        out.write(b"\n" + msgspec.json.encode(peaks) + b"\n")


def load_runs() -> tuple[MeasuredRun, ...]:
    """Return all recorded runs, oldest first; unreadable lines are skipped."""
    file = record_file()
    try:
        stat = file.stat()
    except OSError:
        return ()
    return _read(file, stat.st_mtime_ns, stat.st_size)


_DECODER = msgspec.json.Decoder(MeasuredRun)


@lru_cache(maxsize=1)
def _read(file: Path, modified_ns: int, size: int) -> tuple[MeasuredRun, ...]:
    """Read the file. The result is cached until the file changes: screens call this at every key press."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return ()
    return tuple(run for line in lines if (run := try_json(line, _DECODER)) is not None)


class TransferSpeed(Struct, frozen=True, kw_only=True):
    """Measured speeds of one GPU in this machine."""

    at: UnixTime
    """Unix time of the measurement, in seconds."""
    bytes_per_s: float
    """Speed of copies from pinned host memory to the GPU."""
    flops_per_s: float
    """Speed of matrix products in the compute dtype, including dequantizing the weight from NF4."""


def speed_file() -> Path:
    """Return the file with the measured speeds, keyed by the name of the GPU."""
    return state_dir() / "transfer.json"


def record_speed(gpu: str, speed: TransferSpeed) -> None:
    """Replace the measured speeds of one GPU. Raises OSError."""
    speeds = dict(_load()) | {gpu: speed}
    atomic_write(speed_file(), msgspec.json.encode(speeds))


def measured_speed(gpu: str) -> TransferSpeed | None:
    """Return the speeds measured on a GPU of this machine; None if there are none."""
    return _load().get(gpu)


def _load() -> dict[str, TransferSpeed]:
    file = speed_file()
    try:
        stat = file.stat()
    except OSError:
        return {}
    return _read_speeds(file, stat.st_mtime_ns, stat.st_size)


_MAX_BYTES = 1 << 20
_SPEED_DECODER = msgspec.json.Decoder(dict[str, TransferSpeed])


@lru_cache(maxsize=1)
def _read_speeds(file: Path, modified_ns: int, size: int) -> dict[str, TransferSpeed]:
    """Read the file; the result is cached until the file changes. A damaged file counts as no measurement."""
    speeds = read_json(file, _SPEED_DECODER, _MAX_BYTES) or {}
    return {gpu: each for gpu, each in speeds.items() if each.bytes_per_s > 0 and each.flops_per_s > 0}
