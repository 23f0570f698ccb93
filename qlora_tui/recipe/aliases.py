"""Other names of settings: spellings that are accepted, and misspellings, for which there are hints.

``aliases.toml`` has the tables: ``ALIASES``, ``RELATED`` and ``REMOVED``. ``VALUES`` has other spellings of
values.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
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


def resolve(section: str, key: str) -> str | None:
    """Resolve an alias to its setting, as ``section.key``; None if ``key`` is not an alias.

    ``section`` is empty above the sections of a file.
    """
    path = f"{section}.{key}" if section else key
    return None if path in fields() else ALIASES.get(key)


def canonical_value(path: str, value: Any) -> Any:
    """Return our spelling of the value of a setting ``section.key``; other values stay unchanged."""
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
    """Return the layer with our spelling of every key and value. ``layer`` has passed validation."""
    result: dict[str, Any] = {}
    for section, key, value in _entries(layer):
        path = resolve(section, key)
        if path is not None:
            section, _, key = path.rpartition(".")
        if is_ignored(f"{section}.{key}", value):
            continue
        value = canonical_value(f"{section}.{key}", value)
        if section:
            result.setdefault(section, {})[key] = value
        else:
            result[key] = value
    return result


def notes(layer: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each key in another trainer's spelling, which names our setting."""
    spelled = [(key, resolve(section, key)) for section, key, _ in _entries(layer) if key in ALIASES]
    return [f"{key} is read as {path}." for key, path in spelled if path]


def duplicates(layer: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield keys that set the same setting as another key: (section, key, other key as written, setting)."""
    first: dict[str, str] = {}
    for section, key, _ in _entries(layer):
        written = f"{section}.{key}" if section else key
        path = resolve(section, key) or written
        if path in first:
            yield section, key, first[path], path
        first.setdefault(path, written)


def _entries(layer: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (section, key, value) of a layer; the section is empty for keys above the sections."""
    for name, value in layer.items():
        if name in sections() and isinstance(value, Mapping):
            for key, inner in value.items():
                yield name, key, inner
        else:
            yield "", name, value


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate most similar to ``word``, ignoring case and dashes; None if none is similar."""
    from difflib import get_close_matches  # only errors need it; a tenth of the import time

    by_plain = {normalize_key(candidate): candidate for candidate in candidates}
    matches = get_close_matches(normalize_key(word), by_plain, n=1)
    return by_plain[matches[0]] if matches else None


def did_you_mean(word: str, candidates: Iterable[str], shape: str = "{}") -> str:
    """Return ``did you mean [lora]?``, or an empty string. ``shape`` is the format of the candidate."""
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
