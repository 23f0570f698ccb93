"""Text beside and below the bars of the Memory screen: items, settings with their keys, changes that fit."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap

from textual.content import Content

from qlora_tui.formatting import GIB, format_bytes, format_gib, format_percent
from qlora_tui.memory import Estimate, Item, KeptLayersPlan, MemorySaving, Verdict, WhatFits
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import LOADING, Precision
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.key_names import bare_key, highlight_keys, key_name
from qlora_tui.tui.render.block_charts import bar
from qlora_tui.tui.render.recipe_line import PRECISION_NAMES, VERDICT_STYLE
from qlora_tui.tui.screens.memory.solution import Solution
from qlora_tui.tui.screens.memory.stacked_bar import part_of
from qlora_tui.tui.system_status import SystemStatus

CHANGES_SHOWN = 4
BAR_WIDTH = 24


def item_line(item: Item, estimate: Estimate, largest_bytes: int, width: int) -> Content:
    """``█ Quantized weights   3.0 GiB  47%  ▇▇▇▇``; the bar is against the largest item.

    In a wide window, the explanation is beside it.
    """
    part = part_of(item.key)
    share = format_percent(item.bytes / estimate.total_bytes)
    text = f" {item.label:<20.20} {format_bytes(item.bytes):>9} {share:>4} "
    width_left = width - 1 - len(text)
    drawn = (
        bar(item.bytes / largest_bytes, min(width_left, BAR_WIDTH)).replace("░", " ")
        if width_left >= 4
        else ""
    )
    beside = f"  {item.explanation}"[: max(0, width_left - BAR_WIDTH)] if width_left >= BAR_WIDTH + 60 else ""
    return Content.assemble((part.glyph, part.style), text, (drawn + beside, "$text-muted"))


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
    return size if budget.is_assumed else f"{size}, {budget.name}"


def levels_line(estimate: Estimate) -> str:
    """Peak of the process with its uncertainty, its phase, and the share of torch and its tensors."""
    low, high = format_gib(estimate.band.low_bytes), format_gib(estimate.band.high_bytes)
    doubt = f" ({low} to {high})" if low != high else ""
    reserved, tensors = format_gib(estimate.reserved_bytes), format_gib(estimate.allocated_bytes)
    parts = f"{f'torch {reserved}, ' if reserved != tensors else ''}tensors {tensors}"
    when = "while loading" if estimate.peak_phase == LOADING else estimate.peak_phase
    return f"Peak {format_gib(estimate.process_bytes)} GiB{doubt}, {when}: {parts}"


def setting_controls(recipe: Recipe, fitting: WhatFits | None, context_tokens: int | None) -> Content:
    """The settings that keys change here, and how far each could go with the others as they are."""
    training = recipe.training
    targets = ",".join(recipe.lora.target_modules)
    counted = (
        ("length", "length", recipe.data.max_length, fitting and fitting.sequence_length),
        ("batch", "micro-batch", training.micro_batch_size, fitting and fitting.micro_batch),
        ("rank", "rank", recipe.lora.rank, fitting and fitting.rank),
    )
    lines = [Content.styled(f"×2 ÷2 {'setting':<13} {'now':>7} fits up to", "dim")]
    for command, name, now, most in counted:
        fits = "…" if most is None else f"{most:,}" if most else "none fits"
        keys = "  ".join(bare_key(f"memory.{command}_{way}") for way in ("up", "down"))
        lines.append(_setting_control(keys, name, f"{now:>7,} {fits:>10}"))
        if name == "length" and context_tokens is not None and now > context_tokens:
            lines.append(Content.styled(f"      ! the model's context is {context_tokens:,}", "$warning"))
    lines.append(
        _setting_control(
            bare_key("memory.targets"), "targets", targets if len(targets) < 18 else targets[:16] + "…"
        )
    )
    lines.append(
        _setting_control(bare_key("memory.checkpointing"), "checkpointing", training.gradient_checkpointing)
    )
    return Content("\n").join(lines)


def _setting_control(keys: str, name: str, text: str) -> Content:
    return Content.assemble((f"{keys:<5}", "$accent bold"), f" {name:<13} {text}")


def fixes_text(solution: Solution, width: int) -> list[Content]:
    """What makes the recipe fit, or that nothing does; empty if it fits."""
    if solution.changes:
        return [_changes_text(solution.changes, width)]
    return [_nothing_helps(solution.least_bytes)] if solution.least_bytes else []


def _changes_text(changes: tuple[MemorySaving, ...], width: int) -> Content:
    """Each change that makes it fit, the cheapest first, with its cost."""
    lines = [
        Content.assemble(
            ("To make it fit, press ", "bold"), (key_name("memory.apply"), "$accent bold"), (":", "bold")
        )
    ]
    for number, change in enumerate(changes[:CHANGES_SHOWN]):
        if number == 1:
            lines.append(Content.styled("or:" if len(changes) == 2 else "or change one of these:", "bold"))
        word = change.verdict.word
        for index, part in enumerate(wrap(change.label, width - 2)):
            mark = "  " if index else "▸ " if number == 0 else "· "
            lines.append(Content.assemble((mark, "$accent bold"), part))
        details = Content.assemble(
            f"{format_gib(change.estimate.total_bytes)} GiB ",
            (word, VERDICT_STYLE[word]),
            (f"; {change.cost}" if change.cost else "", "dim"),
        )
        lines += [Content("  ") + part for part in details.wrap(width - 2)]
    return Content("\n").join(lines)


def kept_layers_text(plan: KeptLayersPlan, least_bytes: int) -> Content:
    """How many layers need no recomputation, at what memory, and what that gains.

    ``least_bytes``: the memory with every layer recomputed, as the bars show it.
    """
    if not plan.kept_layers:
        return Content(
            "Gradient checkpointing recomputes every layer: too little memory is left to keep activations."
        )
    total, faster = format_gib(plan.estimate.total_bytes), format_percent(plan.speedup - 1)
    return Content.assemble(
        f"The run needs {format_gib(least_bytes)} GiB and will use ",
        (f"{total} GiB", "bold"),
        f": {plan.kept_layers} of {plan.total_layers} layers keep their activations in free memory, about "
        f"{faster} faster than recomputing every layer.",
    )


def _nothing_helps(least_bytes: int) -> Content:
    """The text shown if no change makes it fit."""
    return highlight_keys(
        "No change makes it fit: with every change that saves memory it still needs "
        f"{format_gib(least_bytes)} GiB. Select a smaller model with {key_name('go.models')}, "
        "or use a larger GPU."
    )


def verdict_text(verdict: Verdict, precision: str) -> Content:
    """The verdict with its numbers: ``NF4 fits: 17.0 GiB to spare``."""
    style = VERDICT_STYLE[verdict.word]
    spare = abs(verdict.spare_bytes) / GIB
    over = verdict.spare_bytes < 0
    words = f"{precision} {verdict.word}"
    rest = f": {spare:.1f} GiB {'over' if over else 'to spare'}. Uncertainty: {verdict.reason}."
    return Content.assemble((words, style), (rest, "dim"))
