"""What two recipes disagree on, in words: for run comparison and "differs from the preset"."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from qlora_tui.recipe.fields import fields, number, value_of
from qlora_tui.recipe.schema import Recipe, Source


class Change(Struct, frozen=True):
    """One setting, before and after."""

    path: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}: {self.before} → {self.after}"


def difference(a: Recipe, b: Recipe) -> list[Change]:
    """What changes from ``a`` to ``b``, in the order of declaration."""
    pairs = [(path, value_of(a, path), value_of(b, path)) for path in fields()]
    return [Change(path, human(before), human(after)) for path, before, after in pairs if before != after]


def human(value: Any) -> str:
    """A setting's value as a person writes it: ``on``, ``1,024``, ``q_proj, k_proj``, ``none``."""
    match value:
        case bool():
            return "on" if value else "off"
        case int() | float():
            return number(value)
        case Source():
            return _source(value)
        case tuple():
            return ", ".join(map(human, value)) or "none"
        case dict():
            return ", ".join(f"{key} = {human(part)}" for key, part in value.items()) or "none"
        case _:
            return str(value) or "none"


def _source(source: Source) -> str:
    notes: list[str] = []
    if source.format != "auto":
        notes.append(source.format)
    if source.columns:
        notes.append(human(source.columns))
    if source.weight != 1:
        notes.append(f"weight {number(source.weight)}")
    return f"{source.path} ({', '.join(notes)})" if notes else source.path
