"""Differences between two recipes: for run comparison and "differs from the preset"."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from qlora_tui.recipe.fields import fields, format_exact, get_setting
from qlora_tui.recipe.schema import Recipe, Source

DESCRIPTIVE = frozenset(("name", "note"))
"""Settings that describe the recipe rather than what it does."""


class SettingChange(Struct, frozen=True):
    """One setting in two recipes."""

    path: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}: {self.before} → {self.after}"


def diff_recipes(a: Recipe, b: Recipe) -> list[SettingChange]:
    """Return the settings that change from ``a`` to ``b``, in the order of declaration."""
    pairs = [(path, get_setting(a, path), get_setting(b, path)) for path in fields()]
    return [
        SettingChange(path, format_value(before), format_value(after))
        for path, before, after in pairs
        if before != after
    ]


def format_value(value: Any) -> str:
    """Format a setting's value for people: ``on``, ``1,024``, ``q_proj, k_proj``, ``none``."""
    match value:
        case bool():
            return "on" if value else "off"
        case int() | float():
            return format_exact(value)
        case Source():
            return _format_source(value)
        case tuple():
            return ", ".join(map(format_value, value)) or "none"
        case dict():
            return ", ".join(f"{key} = {format_value(part)}" for key, part in value.items()) or "none"
        case _:
            return "none" if value is None else str(value) or "none"


def _format_source(source: Source) -> str:
    notes: list[str] = []
    if source.format != "auto":
        notes.append(source.format)
    if source.columns:
        notes.append(format_value(source.columns))
    if source.weight != 1:
        notes.append(f"weight {format_exact(source.weight)}")
    if source.excluded_rows:
        notes.append(f"without rows {source.excluded_rows}")
    return f"{source.path} ({', '.join(notes)})" if notes else source.path
