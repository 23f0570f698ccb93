"""What stands beside and under the bars of the Memory screen: keys with their settings, changes, items."""

from __future__ import annotations

from textwrap import wrap

from textual.content import Content

from qlora_tui.format import GIB, gib, percent, size
from qlora_tui.memory import Change, Estimate, Item, Verdict, WhatFits
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.widgets.memory_bar import bar
from qlora_tui.tui.widgets.recipe_strip import VERDICT_STYLE
from qlora_tui.tui.widgets.stacked_bar import part_of

CHANGES_SHOWN = 4
BAR_WIDTH = 24


def item_line(item: Item, made: Estimate, largest_bytes: int, width: int) -> Content:
    """``█ Quantized weights   3.0 GiB  47%  ▇▇▇▇``; the bar is against the largest item.

    Where there is room, the explanation stands beside it.
    """
    part = part_of(item.key)
    share = percent(item.bytes / made.total_bytes)
    text = f" {item.label:<20.20} {size(item.bytes):>9} {share:>4} "
    room = width - 1 - len(text)
    drawn = bar(item.bytes / largest_bytes, min(room, BAR_WIDTH)).replace("░", " ") if room >= 4 else ""
    beside = f"  {item.explanation}"[: max(0, room - BAR_WIDTH)] if room >= BAR_WIDTH + 60 else ""
    return Content.assemble((part.glyph, part.style), text, (drawn + beside, "$text-muted"))


def levels_line(made: Estimate) -> str:
    """The three tiers with the doubt, and the moment it is fullest."""
    tensors = f"tensors {gib(made.allocated_bytes)}"
    if made.reserved_bytes != made.allocated_bytes:
        tensors += f", torch {gib(made.reserved_bytes)}"
    doubt = f"({gib(made.band.low_bytes)} to {gib(made.band.high_bytes)})"
    return f"{tensors}, process {gib(made.process_bytes)} {doubt} GiB, in the {made.peak_phase}"


def levers(recipe: Recipe, fitting: WhatFits | None) -> Content:
    """The settings that keys change here, and how far each could go with the others as they are."""
    training = recipe.training
    targets = ",".join(recipe.lora.target_modules)
    counted = (
        ("s S", "length", recipe.data.max_length, fitting and fitting.sequence_length),
        ("b B", "micro-batch", training.micro_batch, fitting and fitting.micro_batch),
        ("r R", "rank", recipe.lora.rank, fitting and fitting.rank),
    )
    lines = [Content.styled("key setting        now  fits up to", "dim")]
    for keys, name, now, most in counted:
        fits = "…" if most is None else f"{most:,}" if most else "none"
        lines.append(_lever(keys, f"{name:<11} {now:>6,} {fits:>11}"))
    lines.append(_lever("t", f"{'targets':<11} {targets if len(targets) < 20 else targets[:18] + '…'}"))
    lines.append(_lever("c", f"{'checkpoints':<11} {'on' if training.gradient_checkpointing else 'off'}"))
    return Content("\n").join(lines)


def _lever(keys: str, text: str) -> Content:
    return Content.assemble((f"{keys:<3}", "$accent bold"), f" {text}")


def changes_text(changes: tuple[Change, ...], width: int) -> Content:
    """Each change that makes it fit, the cheapest first, with its price."""
    lines = [Content.styled("To make it fit, the cheapest first", "bold")]
    for number, change in enumerate(changes[:CHANGES_SHOWN]):
        word = change.verdict.word
        for index, part in enumerate(wrap(change.label, width - 2)):
            mark = "  " if index else "a " if number == 0 else "· "
            lines.append(Content.assemble((mark, "$accent bold"), part))
        lines.append(
            Content.assemble(f"  {gib(change.estimate.total_bytes)} GiB ", (word, VERDICT_STYLE[word]))
        )
        cost = wrap(change.cost, width - 2)
        lines += [Content.styled(f"  {part}", "dim") for part in cost]
    return Content("\n").join(lines)


def verdict_text(verdict: Verdict, precision: str) -> Content:
    """What the one word rests on: ``NF4 fits: 17.0 GiB to spare``."""
    style = VERDICT_STYLE[verdict.word]
    spare = abs(verdict.spare_bytes) / GIB
    over = verdict.spare_bytes < 0
    words = f"{precision} {verdict.word}"
    rest = f": {spare:.1f} GiB {'too much' if over else 'to spare'}. Doubt: {verdict.reason}."
    return Content.assemble((words, style), (rest, "dim"))
