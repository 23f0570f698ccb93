"""A rank or an alpha that only some modules have: the question for it, and the setting that follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from qlora_tui.catalog.architecture_types import Architecture, LinearModule
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.diff import format_value
from qlora_tui.recipe.fields import fields, get_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.targets import assign_pattern_values, to_patterns
from qlora_tui.tui.screens.lora.target_input import validate_number
from qlora_tui.tui.screens.modals.dialogs import TextPromptScreen


def custom_value_prompt(
    recipe: Recipe, name: str, modules: Sequence[LinearModule], architecture: Architecture
) -> TextPromptScreen:
    """Ask for the ``name`` (rank or alpha) of these modules."""
    names = {module.name for module in modules}
    usual = format_value(get_setting(recipe, f"lora.{name}"))
    return TextPromptScreen(
        f"{name.title()} of {', '.join(to_patterns(names, architecture.targets))}",
        f"{pluralize(len(names), 'module')}. Leave empty for {usual}, as for all others.",
        "",
        lambda text: validate_number(f"lora.{name}", text),
    )


def custom_value(
    recipe: Recipe, name: str, modules: Sequence[LinearModule], architecture: Architecture, text: str
) -> tuple[str, Any]:
    """Return the setting to change and its new value, after ``text`` was typed."""
    setting, usual = f"lora.{name}_pattern", get_setting(recipe, f"lora.{name}")
    number = msgspec.convert(text.strip() or usual, fields()[f"lora.{name}"].type, strict=False)
    names = {module.name for module in modules}
    own = get_setting(recipe, setting)
    return setting, assign_pattern_values(own, usual, names, number, architecture.targets)
