"""What past runs measured beside what was predicted, and the correction that follows for this machine.

One line of JSON a run in ``memory.jsonl`` in the state directory. The trainer calls :func:`record_run` when a
run ends; :func:`correction_for` is what every estimate for this machine is corrected by, and says from how
many runs.

Two things are learnt apart, because they grow differently. On a card, what torch's allocator reserves grows
with the tensors: that is a factor. What the process holds beside it, the CUDA context, is the same for every
recipe: that is bytes. A CPU tells one figure only, the largest resident set, in which tensors, heap and
libraries cannot be told apart: it says nothing of allocated or reserved bytes, and nothing of any card. All
of its difference is taken for the libraries', as bytes, so that a tiny run does not bend the estimate of a
large one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median

import msgspec
from msgspec import Struct

from qlora_tui.decoding import Count, UnixTime, decode_json
from qlora_tui.paths import state_dir

FEWEST = 2
"""Runs before anything is corrected: one could be an accident."""
MOST_RUNS = 20
"""The latest count; a driver or library may have changed since."""
LEAST, MOST = 0.8, 1.5
"""A factor beyond these says that something else is wrong."""


class MeasuredRun(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Predicted and measured peaks of one run, in bytes. Predicted is without any correction, for the longest
    batch that the run had."""

    at: UnixTime
    """Seconds since the epoch."""
    machine: str
    """Name of the card, or of the CPU."""
    driver: str = ""
    versions: dict[str, str] = {}
    """Of torch and the libraries that matter beside it."""
    model_type: str = ""
    ran_out: bool = False
    """It ended for want of memory: the measured bytes are what it had by then."""
    own_process: bool = False
    """Its process did the run's work only. Before this was recorded, the trainer of a GGUF file's first run
    also converted the file, and the peak of that is in ``measured_process_bytes``."""
    managed_bytes: Count = 0
    """Predicted states of a paged optimizer. They lie outside torch's pool, on the card or not."""
    predicted_allocated_bytes: Count
    predicted_reserved_bytes: Count
    predicted_process_bytes: Count
    measured_allocated_bytes: Count = 0
    """0 on a CPU, as the next."""
    measured_reserved_bytes: Count = 0
    measured_process_bytes: Count

    @property
    def outside_bytes(self) -> int:
        """What the process held beside torch's pool; on a CPU, beside what the tensors should have taken."""
        pool = self.measured_reserved_bytes or self.predicted_reserved_bytes
        return max(0, self.measured_process_bytes - pool)


_DECODER = msgspec.json.Decoder(MeasuredRun)


@dataclass(frozen=True)
class Correction:
    """What the runs on a machine say of its estimates."""

    runs: int
    factor: float = 1.0
    """The reserved tier is multiplied by it."""
    outside_bytes: int | None = None
    """What the process holds beside that; None where no run tells."""
    low: float = 1.0
    """The smallest ratio, among the runs, of what was measured to what it predicts."""
    high: float = 1.0

    @property
    def applies(self) -> bool:
        """There are runs enough."""
        return self.runs >= FEWEST


def record_file() -> Path:
    """Where the runs are kept."""
    return state_dir() / "memory.jsonl"


def record_run(peaks: MeasuredRun) -> None:
    """Add one run. Raises OSError."""
    with record_file().open("ab") as out:
        # One that was torn by a full disk must not take this one with it.
        out.write(b"\n" + msgspec.json.encode(peaks) + b"\n")


def load_runs() -> tuple[MeasuredRun, ...]:
    """Every run kept, oldest first; a line that cannot be read is passed over."""
    file = record_file()
    try:
        stat = file.stat()
    except OSError:
        return ()
    return _read(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1)
def _read(file: Path, modified_ns: int, size: int) -> tuple[MeasuredRun, ...]:
    """The screens ask at every key: the file is read again when it has changed."""
    runs = []
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return ()
    for line in lines:
        try:
            runs.append(decode_json(line, _DECODER))
        except msgspec.MsgspecError:
            continue
    return tuple(runs)


def correction_for(machine: str) -> Correction | None:
    """From the latest runs on ``machine``; None where there are none."""
    runs = [run for run in load_runs() if run.machine == machine and _tells(run)][-MOST_RUNS:]
    if not runs:
        return None
    if len(runs) < FEWEST:
        return Correction(len(runs))
    ratios = [
        run.measured_reserved_bytes / run.predicted_reserved_bytes
        for run in runs
        if run.measured_reserved_bytes
    ]
    factor = min(max(median(ratios), LEAST), MOST) if ratios else 1.0
    beside = [run.outside_bytes for run in runs if not run.managed_bytes]
    outside = int(median(beside)) if beside else None
    spread = [run.measured_process_bytes / _corrected_bytes(run, factor, outside) for run in runs]
    return Correction(len(runs), factor, outside, min(spread), max(spread))


def _tells(run: MeasuredRun) -> bool:
    # On a card a conversion leaves no trace; on a CPU it cannot be told from the run.
    if not (run.own_process or run.measured_reserved_bytes):
        return False
    return run.measured_process_bytes > 0 and 0 < run.predicted_reserved_bytes <= run.predicted_process_bytes


def _corrected_bytes(run: MeasuredRun, factor: float, outside: int | None) -> float:
    if outside is None:
        outside = run.predicted_process_bytes - run.predicted_reserved_bytes - run.managed_bytes
    return run.predicted_reserved_bytes * factor + outside + run.managed_bytes
