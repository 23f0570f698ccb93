"""Other names of settings, and other spellings of values.

In a recipe, another name of a setting is an error, and a hint shows the right name. Another spelling of a
value is accepted. ``aliases.toml`` contains the tables ``ALIASES``, ``RELATED`` and ``REMOVED``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_tui.recipe.fields import fields, sections

_TABLES: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
ALIASES: dict[str, str] = _TABLES["aliases"]
RELATED: dict[str, str] = _TABLES["related"]
REMOVED: dict[str, dict[str, str]] = _TABLES["removed"]
VALUES: dict[str, dict[Any, Any]] = {
    "training.gradient_checkpointing": {True: "on", False: "off"},
    "training.gpus": {"all": 0},
    "format": {"label": "decision"},
}
"""Other spellings of values, keyed by setting path or, for a source's settings, by name."""


def canonical_value(path: str, value: Any) -> Any:
    """Return a value in our spelling, or unchanged if it has no other spelling.

    ``path`` is ``section.key`` or, for a setting of a data source, only the key. In a list of sources, every
    setting is converted.
    """
    if isinstance(value, list | tuple):
        return [_canonical_table(each) if isinstance(each, Mapping) else each for each in value]
    spellings = VALUES.get(path, {})
    return spellings.get(value, value) if isinstance(value, bool | str) else value


def _canonical_table(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: canonical_value(key, value) for key, value in table.items()}


def is_ignored(path: str, value: Any) -> bool:
    """Return whether a removed setting has the value that every run uses today."""
    return path not in fields() and isinstance(value, str) and REMOVED.get(path, {}).get(value) == ""


def canonical(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a valid layer with all values in our spelling, and without removed settings that are ignored."""
    result: dict[str, Any] = {}
    for name, value in layer.items():
        if name not in sections() or not isinstance(value, Mapping):
            result[name] = value
        elif table := {
            key: canonical_value(f"{name}.{key}", inner)
            for key, inner in value.items()
            if not is_ignored(f"{name}.{key}", inner)
        }:
            result[name] = table
    return result


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate most similar to ``word``, ignoring case and dashes; None if none is similar."""
    from difflib import get_close_matches  # only errors need it; a tenth of the import time

    by_plain = {normalize_key(candidate): candidate for candidate in candidates}
    matches = get_close_matches(normalize_key(word), by_plain, n=1)
    return by_plain[matches[0]] if matches else None


def did_you_mean(word: str, candidates: Iterable[str], shape: str = "{}") -> str:
    """Return a question such as ``did you mean [lora]?``, or an empty string if no candidate is similar.

    ``shape`` formats the candidate: ``[{}]`` in this example.
    """
    match = closest(word, candidates)
    return f"did you mean {shape.format(match)}?" if match else ""


def hint_for_key(section: str, key: str) -> str:
    """Return a hint for ``section.key``, an unknown setting.

    ``section`` is empty at the top of a file.
    """
    normalized = normalize_key(key)
    section_keys = [field.key for field in fields().values() if field.section == section]
    homes = [field for field in fields().values() if field.key == normalized]
    if normalized not in section_keys and homes:
        home = homes[0].section
        return f"put {normalized} in [{home}]" if home else f"put {normalized} at the top, above the sections"
    if related := ALIASES.get(normalized) or RELATED.get(normalized):
        return f"did you mean {related}?"
    match = closest(key, section_keys)
    if match:
        return f"did you mean {f'{section}.{match}' if section else match}?"
    by_key = {field.key: field.path for field in fields().values()}
    for spelled in ({path: path for path in fields()}, by_key):
        if match := closest(key, spelled):
            return f"did you mean {spelled[match]}?"
    if not section:
        return "the sections are " + ", ".join(f"[{name}]" for name in sections())
    return f"[{section}] takes " + ", ".join(section_keys)


def normalize_key(word: str) -> str:
    """Normalize a key's case and dashes."""
    return word.lower().replace("-", "_")
