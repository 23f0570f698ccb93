"""Text above and below the bars of the Memory screen."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_tui.formatting import format_gib
from qlora_tui.memory import Estimate
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import LOADING, Precision
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.labels import PRECISION_NAMES
from qlora_tui.tui.system_status import SystemStatus


def peak_words(compared: Mapping[Precision, Estimate], *, short: bool) -> str:
    """``Peak of a training step``, or which precisions take the most memory before it, while loading."""
    loading = [PRECISION_NAMES[key] for key, one in compared.items() if one.peak_phase == LOADING]
    if not loading:
        return "Peak" if short else "Peak of a training step"
    if len(loading) == len(compared):
        return "Peak, while loading,"
    return f"Peak ({' and '.join(loading)}: while loading)"


def budget_words(budget: MemoryBudget, system_status: SystemStatus) -> str:
    """``24.0 GiB: RTX 4090, 22.1 free now``: the memory that estimates are compared with."""
    size = f"{format_gib(budget.bytes)} GiB"
    gpu, free = system_status.gpu, system_status.free_bytes
    if gpu is not None and budget.name == gpu.short_name:
        return f"{size}: {budget.name}" + ("" if free is None else f", {format_gib(free)} free now")
    if budget.is_assumed:
        return f"{size} (assumed; {key_name('app.assume_gpu')} changes it)"
    return f"{size}, {budget.name}"


def levels_line(estimate: Estimate, layers: int, *, short: bool) -> str:
    """Peak of the process with its uncertainty and phase, and what of it PyTorch holds, with its tensors.

    ``layers``: how many the model has. ``short``: leave out the tensors, for 76 cells.
    """
    low, high = format_gib(estimate.band.low_bytes), format_gib(estimate.band.high_bytes)
    doubt = f" ({low} to {high})" if low != high else ""
    reserved, tensors = format_gib(estimate.reserved_bytes), format_gib(estimate.allocated_bytes)
    in_tensors = "" if short else f" of it, {tensors} in tensors"
    peak = f"Peak {format_gib(estimate.process_bytes)} GiB{doubt}, {peak_time(estimate, layers)}"
    return f"{peak}; PyTorch {'' if short else 'holds '}{reserved}{in_tensors}"


def peak_time(estimate: Estimate, layers: int) -> str:
    """``while loading``, or the part of the step: ``backward of the last layer``.

    Layers are counted from 0, as on the LoRA screen.
    """
    if estimate.peak_phase == LOADING:
        return "while loading"
    head, _, number = estimate.peak_phase.rpartition(" layer ")
    ends = {"0": "first", str(layers - 1): "last"}
    return f"{head} the {ends[number]} layer" if head and number in ends else estimate.peak_phase
