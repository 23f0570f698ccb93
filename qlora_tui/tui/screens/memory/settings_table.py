"""The table of the Memory screen: each setting, its largest value that fits, and the effect of its key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from textual.content import Content

from qlora_tui.formatting import format_delta, pluralize
from qlora_tui.memory import WhatFits
from qlora_tui.memory.explain import INSTANT
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.key_names import key_label
from qlora_tui.tui.screens.memory.what_fits import CYCLED_SETTINGS, HALVED_SETTINGS, KeyEffect

_KEYS, _NAME, _NOW, _MAX = 4, 10, 6, 8
"""Widths, in cells, of the columns to the left of the change in memory."""


def settings_table(
    recipe: Recipe,
    fitting: WhatFits | None,
    lowered: Mapping[str, KeyEffect],
    context_tokens: int | None,
    width: int,
) -> Content:
    """Return a line for each setting: its value, the largest value that fits, and the change in memory if the
    setting is halved or, for a setting with one key, set to its next value. The largest value and the change
    in memory assume that all other settings are unchanged.

    Args:
        recipe: The recipe.
        fitting: The largest values that fit; None until they have been computed.
        lowered: The effect of the key that halves a setting or selects its next value, by the path of the
            setting.
        context_tokens: The length that the model was trained for; None if unknown.
        width: Width of the table in cells, at least 38.
    """
    training, is_known = recipe.training, fitting is not None
    head = f"{'setting':<{_NAME}}{'now':>{_NOW}}{'max fit':>{_MAX}}"
    is_exact = all(change.is_exact for change in lowered.values())
    lines = [_line(Content(""), head, "halving" if is_exact else f"{INSTANT} halving", width).stylize("dim")]
    counted = (  # in the order of HALVED_SETTINGS
        ("length", "length", recipe.data.max_length, fitting and fitting.sequence_length),
        ("batch", "micro-batch", training.micro_batch_size, fitting and fitting.micro_batch),
        ("rank", "rank", recipe.lora.rank, fitting and fitting.rank),
    )
    for path, (command, name, now, most) in zip(HALVED_SETTINGS, counted, strict=True):
        fits = "…" if most is None else f"{most:,}" if most else "none"
        text = f"{name}{now:>{_NAME + _NOW - len(name)},}{fits:>{_MAX}}"
        keys = Content(" ").join(key_label(f"memory.{command}_{way}") for way in ("up", "down"))
        lines.append(_line(keys, text, _change_words(lowered.get(path), is_known=is_known), width))
        if name == "length" and context_tokens is not None and now > context_tokens:
            warning = f"! the model's context is {context_tokens:,}"
            lines.append(_line(Content(""), warning, "", width).stylize("$warning"))
    chosen = (
        ("targets", "targets", recipe.lora.target_modules),
        ("checkpointing", "recompute", training.gradient_checkpointing),
    )
    for path, (command, name, choice) in zip(CYCLED_SETTINGS, chosen, strict=True):
        after = lowered.get(path)
        arrow = "" if after is None else f" → {_choice_words(after.value)}"
        text = f"{name:<{_NAME}}{_choice_words(choice)}{arrow}"
        change = _change_words(after, is_known=is_known)
        lines.append(_line(key_label(f"memory.{command}"), text, change, width))
    return Content("\n").join(lines)


def _line(keys: Content, text: str, change: str, width: int) -> Content:
    room = width - _KEYS
    # In a narrow window, long names of target modules leave no room for the unit.
    if len(text) + len(change) >= room:
        text, change = text.replace(" → ", "→"), change.removesuffix(" GiB")
    if len(text) + len(change) >= room:
        text, change = re.sub(" targets?→", "→", text), change.removesuffix(" need")
    if len(text) + len(change) >= room:
        text = text.replace("all-linear", "all")
    if len(text) + len(change) >= room:
        text = f"{text[: max(0, room - len(change) - 2)]}… "
    return Content.assemble(
        keys, " " * max(1, _KEYS - keys.cell_length), text, change.rjust(room - len(text))
    )


def _change_words(change: KeyEffect | None, *, is_known: bool) -> str:
    """Return the change in memory, such as ``-102 MiB``. If the memory would not change, return ``–``, or
    ``…`` if changes have not been computed yet (``is_known`` is False).
    """
    # For gradient checkpointing, the values auto and on need the same memory, because auto uses more only if
    # more is free.
    return format_delta(change.bytes) if change and change.bytes else "–" if change or is_known else "…"


def _choice_words(value: Any) -> str:
    """Return a setting's value as text. Names of target modules are abbreviated, such as ``q,v`` for
    ``q_proj`` and ``v_proj``. If they are still too long, only their number is returned.
    """
    if isinstance(value, str):
        return value
    names = ",".join(name.removesuffix("_proj") for name in value)
    return names if len(names) <= len("all-linear") else pluralize(len(value), "target")
