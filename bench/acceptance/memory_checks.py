"""Checks of the memory estimate: against torch's own count, and where memory really runs out."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.acceptance.context import CheckContext, CheckSkipped, Outcome
from bench.acceptance.runs import EndedRun, short_recipe, train
from bench.support.random_model import make_rows
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.memory import Device, estimate
from qlora_tui.memory.budget import local_budget
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe, Source
from qlora_tui.runs.events import Environment, Failed, Finished, LayersKept, MemoryMeasured, Started

_MEAN_ERROR, _WORST_ERROR = 0.02, 0.05
"""Mean and largest relative error of the allocated memory that the estimate claims."""
_TOO_MUCH = 1.3
"""Multiple of the GPU's memory that a run must be estimated to need, to be sure that it does not fit."""
_MAX_MICRO_BATCH = 4096
LONGEST = 2048
"""Number of tokens of the longest sequence of the grid."""


@dataclass(frozen=True)
class Cell:
    """One recipe of the grid."""

    micro_batch: int
    length: int
    checkpointing: str
    packing: bool = False
    dropout: float = 0.05
    compute_dtype: str = "auto"


GRID = [
    *(Cell(m, n, c) for c in ("on", "off") for m in (1, 4) for n in (512, LONGEST)),
    Cell(4, LONGEST, "auto"),
    Cell(1, LONGEST, "on", packing=True),
    Cell(1, LONGEST, "on", dropout=0.0),
    Cell(1, LONGEST, "on", compute_dtype="float16"),
]


def estimated_device(triton: bool = True) -> Device:
    """Return the device that estimates use, without corrections from earlier runs.

    ``triton`` says whether Triton kernels are used.
    """
    device = local_budget().device
    return replace(device, correction=None, triton=device.triton and triton)


def grid(context: CheckContext) -> Outcome:
    """Compare the estimate with torch's count of allocated memory; on a CPU, with the resident set."""
    architecture = resolve_model(context.model).architecture
    rows: list[dict[str, Any]] = []
    longest_s = 0.0
    # Without a GPU, the grid is a dry run.
    cells = GRID if context.has_gpu else GRID[::6]
    for cell in cells:
        # A killed check would lose its measurements, so end before the deadline.
        if context.seconds_left < 1.5 * longest_s:
            break
        began = time.monotonic()
        row = vars(cell) | _measured(context, cell, architecture)
        longest_s = max(longest_s, time.monotonic() - began)
        rows.append(row)
    errors = [abs(row["error"]) for row in rows if "error" in row]
    if not errors:
        raise AssertionError("no run of the grid fitted")
    mean, worst = sum(errors) / len(errors), max(errors)
    level = "allocated" if context.has_gpu else "process (on a CPU nothing is required of it)"
    return Outcome.of(
        not context.has_gpu or (mean <= _MEAN_ERROR and worst <= _WORST_ERROR),
        f"{len(errors)} of {len(cells)} measured; {level}: error {mean:.1%} on average, {worst:.1%} at most",
        {"rows": rows, "mean": mean, "worst": worst},
    )


def _measured(context: CheckContext, cell: Cell, architecture: Any) -> dict[str, Any]:
    """Return estimate and measurement of one cell; empty if it ran out of memory."""
    if cell.compute_dtype == "float16" and not context.has_gpu:
        return {}
    recipe = _long_recipe(
        context,
        data__max_length=cell.length,
        data__packing=cell.packing,
        lora__dropout=cell.dropout,
        quantization__compute_dtype=cell.compute_dtype,
        training__micro_batch_size=cell.micro_batch,
        training__gradient_checkpointing=cell.checkpointing,
    )
    ended = train(recipe)
    if not ended.events_of(Finished) or len(ended.events_of(Started)) > 1:
        return {}
    measured = ended.events_of(MemoryMeasured)[-1]
    if context.has_gpu and cell.checkpointing != "auto":
        device = estimated_device(ended.events_of(Environment)[-1].kernels == "triton")
        estimated = estimate(recipe, architecture, device=device).allocated_bytes
        counted = measured.allocated_bytes
    else:
        # The number of kept layers depends on the free memory, which only the trainer knows.
        estimated, counted = measured.estimated_bytes, measured.measured_bytes
    return {
        "kept_layers": max((event.kept_layers for event in ended.events_of(LayersKept)), default=0),
        "estimated_bytes": estimated,
        "measured_bytes": counted,
        "error": estimated / counted - 1,
        "process_estimated_bytes": measured.estimated_bytes,
        "process_measured_bytes": measured.measured_bytes,
        "reserved_bytes": measured.reserved_bytes,
    }


def memory(context: CheckContext) -> Outcome:
    """Check that a too large micro-batch is halved until it fits, with as many rows per step."""
    if not context.has_gpu:
        raise CheckSkipped("memory runs out for real on a GPU only")
    recipe = _too_large(context)
    micro_batch = recipe.training.micro_batch_size
    rows = make_rows(Path(context.scratch) / "many.json", 2 * micro_batch, long_words=LONGEST)
    ended: EndedRun = train(replace_setting(recipe, "data.sources", (Source(path=str(rows)),)))
    started = ended.require_finished().events_of(Started)
    batches = {event.micro_batch_size * event.gradient_accumulation for event in started}
    sizes = [event.micro_batch_size for event in started]
    return Outcome.of(
        len(started) > 1 and batches == {micro_batch},
        f"micro-batch {' → '.join(map(str, sizes))}, {micro_batch} rows per step",
        {"attempts": sizes, "failures": [event.what for event in ended.events_of(Failed)]},
    )


def _too_large(context: CheckContext) -> Recipe:
    """Return a recipe with a micro-batch that is too large for this GPU."""
    budget, architecture = local_budget(), resolve_model(context.model).architecture
    recipe = _long_recipe(context, data__packing=False, training__gradient_checkpointing="off")
    micro_batch = 1
    while micro_batch <= _MAX_MICRO_BATCH:
        recipe = replace_setting(recipe, "training.micro_batch_size", micro_batch)
        needed = estimate(recipe, architecture, device=estimated_device()).allocated_bytes
        if needed > _TOO_MUCH * budget.bytes:
            return recipe
        micro_batch *= 2
    raise CheckSkipped("no micro-batch is too large for this GPU")


def _long_recipe(context: CheckContext, **settings: Any) -> Recipe:
    """Return a recipe of two steps on samples that are all as long as ``data.max_length``."""
    common: dict[str, Any] = {
        "data__sources": (Source(path=context.long_rows),),
        "data__validation_fraction": 0.0,
        "data__max_length": LONGEST,
        "training__gradient_accumulation": 1,
        "training__max_steps": 2,
    }
    return short_recipe(context, **(common | settings))
