"""From tensors to what the card sees: allocated, reserved, process, and how sure we are."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.catalog.facts import Architecture
from qlora_tui.memory.codepath import CodePath
from qlora_tui.memory.kernels import kernel_bytes
from qlora_tui.memory.layout import Layout
from qlora_tui.memory.learning import Correction
from qlora_tui.memory.replay import Pool
from qlora_tui.memory.weights import optimizer_bytes

MIB = 1024 * 1024
CONTEXT_BYTES = 141 * MIB
"""CUDA context with cuBLAS's and bitsandbytes' kernels loaded. Measured 133 to 147 MiB on a T4."""
A100_CONTEXT_BYTES = 522 * MIB
"""That of an A100: what ten runs of a 16-bit base held beside what the allocator reserved (fms-acceleration's
``a100_80gb_liger.csv`` and ``a100_80gb_granite.csv``; torch 2.4.1 with flash-attn and Triton)."""
CONTEXT_DOUBT_BYTES = 400 * MIB
"""Newer cards and drivers take up to this much more."""

SLACK_DOUBT = 0.5
"""How weights are read and which addresses segments get differ from run to run, and with them which free
block a tensor takes: of the 27 runs on a T4 with a quantized base, 24 had at most so much more slack than
replayed, and three 54 to 302 MiB more. Without a quantization 19 runs were within 23 MiB."""


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


RUNTIME_BYTES = 560 * MIB
"""What a trainer on the CPU holds beside its tensors. Measured, with torch's build for the CPU: 480 MiB once
torch, transformers (which brings pandas and pyarrow), peft and bitsandbytes are imported, of which 130 are
read-in library files and 190 Python's objects; 60 for tokenizer, data and the model's modules; 20 of torch's
library that are read in as its kernels are first called."""
CUDA_LIBRARIES_BYTES = 640 * MIB
"""More than that with a build of torch for CUDA, card or not: its libraries are read in, and their kernels
registered. Measured with torch 2.15 for CUDA 13.2: 725 MiB in place of 221 once torch is imported, 1,117 in
place of 475 with the rest (and Triton)."""
RUNTIME_DOUBT_BYTES = RUNTIME_BYTES // 10
"""Libraries of other versions and builds."""
HEAP_HOLES = 6
"""One part in so many of what comes and goes with a step stays in gaps of the heap: rows and samples of other
lengths leave holes too small for the next. glibc returns only what lies at the heap's top, and what is larger
than 32 MiB (``DEFAULT_MMAP_THRESHOLD_MAX``). Measured over the demo, in float32 and in bfloat16."""


def tiers(
    items: dict[str, int],
    moving_bytes: int,
    pool: Pool | None,
    architecture: Architecture,
    layout: Layout,
    path: CodePath,
) -> Tiers:
    """All three, from the items at the peak; ``moving_bytes`` of them come and go with each step. ``pool`` is
    what the allocator of a card came to."""
    allocated = sum(items.values())
    if pool is None:
        return _on_cpu(allocated, moving_bytes, layout, path)
    # Blocks that were not cut count as allocated; with segments that grow all are.
    unsplit = 0 if path.expandable_segments else max(0, pool.allocated_bytes - allocated)
    allocated += unsplit
    slack = pool.reserved_bytes - pool.allocated_bytes
    reserved = allocated + slack
    paged = optimizer_bytes(layout, path) if path.optimizer.startswith("paged") else 0
    context = context_bytes(path)
    process = reserved + context + paged
    doubt = _doubt_bytes(allocated, layout)
    tensors = (
        "2 % of the tensors" if layout.exact else f"{architecture.model_type} layers estimated as Llama's"
    )
    reason = f"{tensors}, half of the allocator's slack, and a CUDA context of 133 to 540 MiB"
    added = {"unsplit": unsplit, "fragmentation": slack, "context": context}
    if paged:
        added["optimizer"] = paged
    return Tiers(
        allocated,
        reserved,
        process,
        added,
        Band(
            process - doubt - slack,
            process + doubt + int(slack * SLACK_DOUBT) + CONTEXT_DOUBT_BYTES,
            reason,
        ),
    )


def context_bytes(path: CodePath) -> int:
    """Of the CUDA context on the path's card. Cards that were not measured are taken for a T4."""
    return A100_CONTEXT_BYTES if path.capability == (8, 0) else CONTEXT_BYTES


def _on_cpu(allocated: int, moving_bytes: int, layout: Layout, path: CodePath) -> Tiers:
    kernels = kernel_bytes(layout, path) if moving_bytes else 0
    slack = moving_bytes // HEAP_HOLES
    reserved = allocated + slack + kernels
    runtime = RUNTIME_BYTES + (CUDA_LIBRARIES_BYTES if path.cuda_libraries else 0)
    process = reserved + runtime
    doubt = _doubt_bytes(allocated, layout) + slack + kernels // 2 + RUNTIME_DOUBT_BYTES
    return Tiers(
        allocated,
        reserved,
        process,
        {"runtime": runtime, "kernels": kernels, "fragmentation": slack},
        Band(process - doubt, process + doubt, "other libraries, and an allocator that returns memory late"),
    )


def corrected(levels: Tiers, layout: Layout, correction: Correction) -> Tiers:
    """As past runs on the machine say they should have been. Allocated stays: it is counted, not guessed."""
    allocated = levels.allocated_bytes
    reserved = max(allocated, int(levels.reserved_bytes * correction.factor))
    kernels = min(levels.added.get("kernels", 0), reserved - allocated)
    added = {**levels.added, "kernels": kernels, "fragmentation": reserved - allocated - kernels}
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
    """2 % of the tensors: most rows of other people's runs and all of the trace's are nearer than that.

    A seventh where the layers are not the family's own: walked as Llama's, each known family is within 12 %.
    """
    return allocated // (50 if layout.exact else 7)
