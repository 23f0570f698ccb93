"""The settings that keys of the Memory screen change: values, the most that fits, what less of each saves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from textual.content import Content

from qlora_tui.formatting import GIB, pluralize
from qlora_tui.memory import WhatFits
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.key_names import key_label
from qlora_tui.tui.screens.memory.solution import CYCLED_SETTINGS, HALVED_SETTINGS, KeyEffect

_KEYS, _NAME, _NOW, _MAX = 4, 11, 6, 8
"""Cells of the columns before the change; a long value takes some of the name's."""


def settings_table(
    recipe: Recipe,
    fitting: WhatFits | None,
    lowered: Mapping[str, KeyEffect],
    context_tokens: int | None,
    width: int,
) -> Content:
    """A line for each setting; the others stay as they are for its largest value and its change.

    Args:
        recipe: The settings as they are.
        fitting: The largest values that fit; None until they are computed.
        lowered: What the key for less changes, by the setting's path.
        context_tokens: The length that the model was trained for; None where it is unknown.
        width: Of the table, in cells; 38 or more.
    """
    training, is_known = recipe.training, fitting is not None
    head = f"{'setting':<{_NAME}}{'now':>{_NOW}}{'max fit':>{_MAX}}"
    lines = [_line(Content(""), head, "halving", width).stylize("dim")]
    counted = (
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
        text = f"{name:<{_NAME - 1}}{_choice_words(choice)}{arrow}"
        change = _change_words(after, is_known=is_known)
        lines.append(_line(key_label(f"memory.{command}"), text, change, width))
    return Content("\n").join(lines)


def _line(keys: Content, text: str, change: str, width: int) -> Content:
    room = width - _KEYS
    # In a narrow window the names of targets leave no room for the unit.
    if len(text) + len(change) >= room:
        text, change = text.replace(" → ", "→"), change.removesuffix(" GiB")
    if len(text) + len(change) >= room:
        text, change = re.sub(" targets?→", "→", text), change.removesuffix(" need")
    if len(text) + len(change) >= room:
        text = f"{text[: max(0, room - len(change) - 2)]}… "
    return Content.assemble(
        keys, " " * max(1, _KEYS - keys.cell_length), text, change.rjust(room - len(text))
    )


def format_change(bytes_: int) -> str:
    """``-0.1``: a change in GiB; without a sign where it rounds to 0."""
    text = f"{bytes_ / GIB:+.1f}"
    return "0.0" if float(text) == 0 else text


def _change_words(change: KeyEffect | None, *, is_known: bool) -> str:
    if change is None:
        return "–" if is_known else "…"
    # Auto needs what on needs; it only takes more where more is free.
    return f"{format_change(change.bytes)} GiB" if change.bytes else "same need"


def _choice_words(value: Any) -> str:
    """``q,k,v,o`` for modules with long names, of which ``q_proj`` is one."""
    if isinstance(value, str):
        return value
    names = ",".join(name.removesuffix("_proj") for name in value)
    return names if len(names) <= len("all-linear") else pluralize(len(value), "target")
