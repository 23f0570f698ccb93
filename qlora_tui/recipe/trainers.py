"""The meaning of other trainers' keys, from ``trainers.toml``, for imports and exports."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from qlora_tui.recipe.aliases import ALIASES


class Rule(Struct, frozen=True, forbid_unknown_fields=True):
    """The meaning of another trainer's key."""

    to: str = ""
    """Path of the corresponding setting, ``section.key``; empty if there is none."""
    values: dict[str, Any] = {}
    """Our spelling of the trainer's values, keyed by their text; empty if the spelling is the same."""
    off: list[Any] = []
    """Values that turn the feature off."""
    why: str = ""
    """Why the key, or a value outside ``values``, has no counterpart."""
    refuse: str = ""
    """What a file trains if it sets this key to a value in neither ``off`` nor ``values``.

    Such a file is not imported. Empty if the value is only left out.
    """
    same_as: str = ""
    """Another key with the same rule."""


class Trainer(Struct, frozen=True, forbid_unknown_fields=True):
    """Another trainer: its keys, and its behavior if a file does not set a key."""

    label: str
    keys: dict[str, str | Rule]
    required: str
    """The key without which a file trains every weight, or nothing."""
    marks: list[str] = []
    """Keys that identify the trainer's files."""
    alpha_per_rank: float = 0.0
    """Alpha per rank if a file sets no alpha; 0 for our default."""
    defaults: dict[str, Any] = {}
    """The trainer's defaults, as our settings."""
    calls: list[str] = []
    """Functions and classes whose arguments in a script are settings."""
    classes: dict[str, dict[str, Any]] = {}
    """Keys that a script sets by calling a class."""
    writes: dict[str, list[str]] = {}
    """Keys to write when exporting a recipe, by the call whose arguments they are (see :mod:`.exported`)."""


class Datasets(Struct, frozen=True, forbid_unknown_fields=True):
    """How other trainers specify data: loaders, formats, columns, and the meaning of each dataset option."""

    loaders: list[str]
    formats: dict[str, str]
    unneeded: list[str]
    fields: dict[str, str]
    columns: dict[str, str]
    media: list[str]
    why: dict[str, str]


class _Tables(Struct, frozen=True, forbid_unknown_fields=True):
    keys: dict[str, str | Rule]
    unneeded: dict[str, list[str]]
    trainers: dict[str, Trainer]
    datasets: Datasets


TABLES = msgspec.convert(
    tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")), _Tables
)
"""The content of ``trainers.toml``."""


class LeftOut(Struct, frozen=True):
    """A key without a counterpart."""

    key: str
    value: Any
    why: str
    """Why it has none; empty if the key is unknown."""


def rule_of(trainer: Trainer, key: str) -> Rule | None:
    """Return the rule for a trainer's key.

    None if the key is unknown, or if it does not change what is learned.
    """
    rules = TABLES.keys | trainer.keys
    rule = rules.get(key)
    if rule is None:
        rule = next((rule for name, rule in rules.items() if "*" in name and fnmatchcase(key, name)), None)
    if rule is None and not is_unneeded(key):
        rule = ALIASES.get(key)
    if isinstance(rule, str):
        return Rule(to=rule)
    if rule is not None and rule.same_as:
        return rule_of(trainer, rule.same_as)
    return rule


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return all keys and values, with keys that contain a dot in nested tables."""
    tables: dict[str, Any] = {}
    for key, value in keys.items():
        table, _, inner = key.rpartition(".")
        if table:
            tables.setdefault(table, {})[inner] = value
        else:
            tables[key] = value
    return tables


def is_unneeded(key: str) -> bool:
    """Return whether a key does not change what is learned."""
    return any(fnmatchcase(key, pattern) for pattern in TABLES.unneeded["patterns"])
