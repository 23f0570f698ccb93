"""From tensors to what the card sees: allocated, reserved, process, and how sure we are."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.catalog.facts import Architecture
from qlora_tui.memory.codepath import CodePath
from qlora_tui.memory.layout import Layout
from qlora_tui.memory.learning import Correction
from qlora_tui.memory.weights import optimizer_bytes

MIB = 1024 * 1024
SEGMENT_BYTES = 20 * MIB
"""The allocator takes memory for blocks of 1 to 10 MiB in segments of this size (``kLargeBuffer``), and maps
expandable segments in steps of it."""
CONTEXT_BYTES = 141 * MIB
"""CUDA context with cuBLAS's and bitsandbytes' kernels loaded. Measured 133 to 147 MiB on a T4."""
CONTEXT_DOUBT_BYTES = 400 * MIB
"""Newer cards and drivers take up to this much more."""


@dataclass(frozen=True)
class Band:
    """Where the truth may lie."""

    low_bytes: int
    high_bytes: int
    reason: str


@dataclass(frozen=True)
class Tiers:
    """Three figures that must not be mixed, and the items that lead from one to the next."""

    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    added: dict[str, int]
    band: Band


RUNTIME_BYTES = 480 * MIB
"""Resident memory of the trainer once torch, transformers, peft and bitsandbytes are imported. Measured."""
HEAP_SLACK = 5
"""A CPU's heap holds about one part in this many beyond the tensors: glibc returns only what lies at its top.
Measured 1.16 to 1.22 times the tensors."""


def tiers(items: dict[str, int], architecture: Architecture, layout: Layout, path: CodePath) -> Tiers:
    """All three, from the items at the peak."""
    allocated = sum(items.values())
    if path.device == "cpu":
        slack = allocated // HEAP_SLACK
        process = allocated + slack + RUNTIME_BYTES
        return Tiers(
            allocated,
            allocated + slack,
            process,
            {"runtime": RUNTIME_BYTES, "fragmentation": slack},
            Band(process - slack, process + slack, "the system's allocator returns freed memory late"),
        )
    slack = SEGMENT_BYTES + allocated // 50
    reserved = allocated + slack
    paged = optimizer_bytes(layout, path) if path.optimizer.startswith("paged") else 0
    process = reserved + CONTEXT_BYTES + paged
    doubt = _doubt_bytes(allocated, layout)
    reason = (
        "2 % of the tensors, and a CUDA context of 133 to 540 MiB depending on card and driver"
        if layout.exact
        else f"{architecture.model_type} layers are estimated as Llama's"
    )
    added = {"fragmentation": slack, "context": CONTEXT_BYTES}
    if paged:
        added["optimizer"] = paged
    return Tiers(
        allocated,
        reserved,
        process,
        added,
        Band(process - doubt - slack, process + doubt + CONTEXT_DOUBT_BYTES, reason),
    )


def corrected(levels: Tiers, layout: Layout, correction: Correction) -> Tiers:
    """As past runs on the machine say they should have been. Allocated stays: it is counted, not guessed."""
    allocated = levels.allocated_bytes
    reserved = max(allocated, int(levels.reserved_bytes * correction.factor))
    added = {**levels.added, "fragmentation": reserved - allocated}
    if correction.outside_bytes is not None:
        added["runtime" if "runtime" in added else "context"] = correction.outside_bytes
    process = allocated + sum(added.values())
    doubt = _doubt_bytes(allocated, layout)
    return Tiers(
        allocated,
        reserved,
        process,
        added,
        Band(
            max(0, int(process * min(correction.low, 1)) - doubt),
            int(process * max(correction.high, 1)) + doubt,
            f"the spread of {correction.runs} runs on this machine, and {'2 %' if layout.exact else '14 %'}",
        ),
    )


def _doubt_bytes(allocated: int, layout: Layout) -> int:
    """2 % of the tensors; a seventh where the layers are not the family's own."""
    return allocated // (50 if layout.exact else 7)
