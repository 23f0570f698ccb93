"""What past runs measured beside what was predicted, and the correction that follows for this machine.

One line of JSON a run in ``memory.jsonl`` in the state directory. The trainer calls :func:`remember` when a
run ends; :func:`correction_for` is what the next estimate is adjusted by, and says from how many runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import msgspec
from msgspec import Struct

from qlora_tui.memory.estimate import Estimate, Item
from qlora_tui.memory.explain import LABELS
from qlora_tui.memory.tiers import Band
from qlora_tui.paths import state_dir

FEWEST = 2
"""Runs before anything is corrected: one could be an accident."""
MOST_RUNS = 20
"""The latest count; a driver or library may have changed since."""
LEAST, MOST = 0.8, 1.5
"""A correction beyond these says that something else is wrong."""


class Peaks(Struct, frozen=True, kw_only=True):
    """Predicted and measured peaks of one run, in bytes."""

    at: float
    """Seconds since the epoch."""
    machine: str
    """Name of the card, or of the CPU."""
    driver: str = ""
    versions: str = ""
    """torch, transformers, peft and bitsandbytes."""
    model_type: str = ""
    predicted_allocated_bytes: int
    predicted_reserved_bytes: int
    predicted_process_bytes: int
    measured_allocated_bytes: int = 0
    measured_reserved_bytes: int = 0
    measured_process_bytes: int


@dataclass(frozen=True)
class Correction:
    """The process tier is multiplied by ``factor``."""

    factor: float
    runs: int
    low: float
    """The smallest ratio of measured to predicted among the runs."""
    high: float


def record_file() -> Path:
    """Where the runs are kept."""
    return state_dir() / "memory.jsonl"


def remember(peaks: Peaks, file: Path | None = None) -> None:
    """Add one run."""
    with (file or record_file()).open("ab") as out:
        out.write(msgspec.json.encode(peaks) + b"\n")


def recall(file: Path | None = None) -> list[Peaks]:
    """Every run kept, oldest first; a line that cannot be read is passed over."""
    found = []
    try:
        lines = (file or record_file()).read_bytes().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(msgspec.json.decode(line, type=Peaks))
        except msgspec.DecodeError:
            continue
    return found


def correction_for(machine: str, file: Path | None = None) -> Correction | None:
    """From the latest runs on ``machine``; None while there are too few."""
    ratios = [
        peaks.measured_process_bytes / peaks.predicted_process_bytes
        for peaks in recall(file)
        if peaks.machine == machine and peaks.predicted_process_bytes > 0 < peaks.measured_process_bytes
    ][-MOST_RUNS:]
    if len(ratios) < FEWEST:
        return None
    factor = min(max(median(ratios), LEAST), MOST)
    return Correction(factor, len(ratios), min(ratios), max(ratios))


def corrected(made: Estimate, correction: Correction | None) -> Estimate:
    """The estimate as this machine's runs say it should have been; unchanged without any.

    The difference goes to what is least known: the allocator's slack, or else what lies outside torch. The
    band becomes the spread that was measured, and 2 %.
    """
    if correction is None:
        return made
    process = int(made.process_bytes * correction.factor)
    items, reserved = _absorb(made, process - made.process_bytes)
    process = sum(item.bytes for item in items)
    many = "runs" if correction.runs > 1 else "run"
    return replace(
        made,
        items=items,
        reserved_bytes=reserved,
        process_bytes=process,
        band=Band(
            int(made.process_bytes * min(correction.low, correction.factor) * 0.98),
            int(made.process_bytes * max(correction.high, correction.factor) * 1.02),
            f"the spread of {correction.runs} {many} on this machine, and 2 %",
        ),
        notes=(*made.notes, f"Corrected by {correction.factor - 1:+.1%} from {correction.runs} {many} here."),
    )


def _absorb(made: Estimate, difference: int) -> tuple[tuple[Item, ...], int]:
    """Items with the difference taken up, and the reserved tier that results."""
    sizes = {item.key: item.bytes for item in made.items}
    order = ["fragmentation", "context" if "context" in sizes else "runtime"]
    if difference > 0:
        sizes[order[0]] = sizes.get(order[0], 0) + difference
    else:
        for key in order:
            taken = min(sizes.get(key, 0), -difference)
            sizes[key] = sizes.get(key, 0) - taken
            difference += taken
    sentences = {item.key: item.explanation for item in made.items}
    items = tuple(
        Item(
            key,
            label,
            sizes[key],
            sentences.get(key, "What past runs on this machine took beyond the tensors."),
        )
        for key, label in LABELS.items()
        if sizes.get(key, 0) > 0
    )
    return items, made.allocated_bytes + sizes.get("fragmentation", 0)
