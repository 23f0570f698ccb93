"""What the keys of other trainers mean here, by ``trainers.toml``: imports read it, exports backwards."""

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
    """What a key of another trainer means."""

    to: str = ""
    """The setting it sets, ``section.key``; empty if there is none."""
    values: dict[str, Any] = {}
    """Our spelling of their values, each written as text; empty if they are ours."""
    off: list[Any] = []
    """Values that mean that the feature is off."""
    why: str = ""
    """Why the key, or a value outside ``values``, has no counterpart."""
    refuse: str = ""
    """What a file with this key trains instead; such a file is not imported."""
    same_as: str = ""
    """Another key whose rule this one has."""


class Trainer(Struct, frozen=True, forbid_unknown_fields=True):
    """Another trainer: its keys, and what it does if a file says nothing."""

    label: str
    keys: dict[str, str | Rule]
    required: str
    """The key without which a file trains every weight, or nothing."""
    marks: list[str] = []
    """Keys by which its files are recognized."""
    alpha_per_rank: float = 0.0
    """Alpha of a file that names none, for each rank; 0: our default."""
    defaults: dict[str, Any] = {}
    """Its defaults, in our settings."""
    calls: list[str] = []
    """Functions and classes of a script whose arguments are settings."""
    classes: dict[str, dict[str, Any]] = {}
    """Keys that a script sets by calling a class."""
    writes: dict[str, list[str]] = {}
    """Keys with which a recipe is written for it, by the call whose arguments they are (see
    :mod:`.exported`)."""


class Datasets(Struct, frozen=True, forbid_unknown_fields=True):
    """How other trainers name data: loaders, formats, columns, and what each option of a dataset means."""

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
"""What the keys of other trainers mean: ``trainers.toml``."""


class LeftOut(Struct, frozen=True):
    """A key without a counterpart."""

    key: str
    value: Any
    why: str
    """Empty if the key is not known."""


def rule_of(trainer: Trainer, key: str) -> Rule | None:
    """Return what a key means to a trainer; None if it is not known."""
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
    """Return keys with a dot as tables."""
    tables: dict[str, Any] = {}
    for key, value in keys.items():
        table, _, inner = key.rpartition(".")
        if table:
            tables.setdefault(table, {})[inner] = value
        else:
            tables[key] = value
    return tables


def is_unneeded(key: str) -> bool:
    """Return whether a key changes nothing of what is learned."""
    return any(fnmatchcase(key, pattern) for pattern in TABLES.unneeded["patterns"])
