"""Text beside and below the bars of the Memory screen: items, settings with their keys, changes that fit."""

from __future__ import annotations

from collections.abc import Mapping

from textual.content import Content

from qlora_tui.formatting import format_gib
from qlora_tui.memory import Estimate, WhatFits
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import LOADING, Precision
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.key_names import key_label
from qlora_tui.tui.render.recipe_line import PRECISION_NAMES
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
    return f"{size} (assumed)" if budget.is_assumed else f"{size}, {budget.name}"


def levels_line(estimate: Estimate) -> str:
    """Peak of the process with its uncertainty, its phase, and the share of torch and its tensors."""
    low, high = format_gib(estimate.band.low_bytes), format_gib(estimate.band.high_bytes)
    doubt = f" ({low} to {high})" if low != high else ""
    reserved, tensors = format_gib(estimate.reserved_bytes), format_gib(estimate.allocated_bytes)
    parts = f"{f'torch {reserved}, ' if reserved != tensors else ''}tensors {tensors}"
    return f"Peak {format_gib(estimate.process_bytes)} GiB{doubt}, {peak_time(estimate)}: {parts}"


def peak_time(estimate: Estimate) -> str:
    """``while loading``, or the part of the step: ``backward of layer 27``."""
    return "while loading" if estimate.peak_phase == LOADING else estimate.peak_phase


def setting_controls(recipe: Recipe, fitting: WhatFits | None, context_tokens: int | None) -> Content:
    """The settings that keys change here, and how far each could go with the others as they are."""
    training = recipe.training
    targets = ",".join(recipe.lora.target_modules)
    counted = (
        ("length", "length", recipe.data.max_length, fitting and fitting.sequence_length),
        ("batch", "micro-batch", training.micro_batch_size, fitting and fitting.micro_batch),
        ("rank", "rank", recipe.lora.rank, fitting and fitting.rank),
    )
    lines = [Content.styled(f"×2 ÷2 {'setting':<13} {'now':>7} {'max':>10}", "dim")]
    for command, name, now, most in counted:
        fits = "…" if most is None else f"{most:,}" if most else "none fits"
        keys = Content("  ").join(key_label(f"memory.{command}_{way}") for way in ("up", "down"))
        lines.append(_setting_control(keys, name, f"{now:>7,} {fits:>10}"))
        if name == "length" and context_tokens is not None and now > context_tokens:
            lines.append(Content.styled(f"      ! the model's context is {context_tokens:,}", "$warning"))
    lines.append(
        _setting_control(
            key_label("memory.targets"), "targets", targets if len(targets) < 18 else targets[:16] + "…"
        )
    )
    lines.append(
        _setting_control(key_label("memory.checkpointing"), "checkpointing", training.gradient_checkpointing)
    )
    return Content("\n").join(lines)


def _setting_control(keys: Content, name: str, text: str) -> Content:
    return Content.assemble(keys, " " * max(0, 5 - keys.cell_length), f" {name:<13} {text}")
