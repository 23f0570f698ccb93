"""Text beside and below the bars of the Memory screen: items, settings with their keys, changes that fit."""

from __future__ import annotations

from collections.abc import Mapping

from textual.content import Content

from qlora_tui.formatting import GIB, format_gib
from qlora_tui.memory import Estimate, WhatFits
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import LOADING, Precision
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.key_names import key_label, key_name
from qlora_tui.tui.render.recipe_line import PRECISION_NAMES
from qlora_tui.tui.screens.memory.solution import HALVED_SETTINGS
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


def setting_controls(
    recipe: Recipe, fitting: WhatFits | None, halved: Mapping[str, int], context_tokens: int | None
) -> Content:
    """The settings that keys change here, how far each could go, and what halving it saves.

    The others stay as they are for both. ``halved``: the bytes that halving adds, by the setting's path.
    """
    training = recipe.training
    targets = ",".join(recipe.lora.target_modules)
    counted = (
        ("length", "length", recipe.data.max_length, fitting and fitting.sequence_length),
        ("batch", "micro-batch", training.micro_batch_size, fitting and fitting.micro_batch),
        ("rank", "rank", recipe.lora.rank, fitting and fitting.rank),
    )
    lines = [Content.styled(f"×2÷2 {'setting':<11}{'now':>7}{'max':>8} ÷2 GiB", "dim")]
    for path, (command, name, now, most) in zip(HALVED_SETTINGS, counted, strict=True):
        fits = "…" if most is None else f"{most:,}" if most else "none"
        saves = format_change(halved[path]) if path in halved else "…" if most is None else "–"
        keys = Content(" ").join(key_label(f"memory.{command}_{way}") for way in ("up", "down"))
        lines.append(_setting_control(keys, name, f"{now:>7,}{fits:>8}{saves:>7}"))
        if name == "length" and context_tokens is not None and now > context_tokens:
            lines.append(Content.styled(f"     ! the model's context is {context_tokens:,}", "$warning"))
    lines.append(
        _setting_control(
            key_label("memory.targets"), "targets", f" {targets if len(targets) < 22 else targets[:20] + '…'}"
        )
    )
    lines.append(
        _setting_control(
            key_label("memory.checkpointing"), "recompute", f" {training.gradient_checkpointing}"
        )
    )
    return Content("\n").join(lines)


def _setting_control(keys: Content, name: str, text: str) -> Content:
    return Content.assemble(keys, " " * max(1, 5 - keys.cell_length), f"{name:<11}{text}")


def format_change(bytes_: int) -> str:
    """``-0.1``: a change in GiB; without a sign where it rounds to 0."""
    text = f"{bytes_ / GIB:+.1f}"
    return "0.0" if float(text) == 0 else text
