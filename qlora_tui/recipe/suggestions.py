"""Suggestions for a misspelled key, section or value."""

from __future__ import annotations

from collections.abc import Iterable

from qlora_tui.recipe import aliases
from qlora_tui.recipe.fields import fields, sections


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate most similar to ``word``, ignoring case and dashes; None if none is similar."""
    from difflib import get_close_matches  # only an error needs it, and it takes a tenth of the import time

    by_plain = {normalize_key(candidate): candidate for candidate in candidates}
    matches = get_close_matches(normalize_key(word), by_plain, n=1)
    return by_plain[matches[0]] if matches else None


def did_you_mean(word: str, candidates: Iterable[str], shape: str = "{}") -> str:
    """``did you mean [lora]?``, or an empty string. ``shape`` is the format of the candidate."""
    match = closest(word, candidates)
    return f"did you mean {shape.format(match)}?" if match else ""


def hint_for_key(section: str, key: str) -> str:
    """Hint for ``section.key``, an unknown setting. ``section`` is empty at the top of a file."""
    normalized = normalize_key(key)
    section_keys = [field.key for field in fields().values() if field.section == section]
    homes = [field for field in fields().values() if field.key == normalized]
    if normalized not in section_keys and homes:
        home = homes[0].section
        return f"put {normalized} in [{home}]" if home else f"put {normalized} at the top, above the sections"
    if related := aliases.ALIASES.get(normalized) or aliases.RELATED.get(normalized):
        return f"did you mean {related}?"
    match = closest(key, section_keys)
    if match:
        return f"did you mean {f'{section}.{match}' if section else match}?"
    path = closest(key, [field.path for field in fields().values()]) or _closest_key(key)
    if path:
        return f"did you mean {path}?"
    if not section:
        return "the sections are " + ", ".join(f"[{name}]" for name in sections())
    return f"[{section}] takes " + ", ".join(section_keys)


def _closest_key(key: str) -> str | None:
    by_key = {field.key: field.path for field in fields().values()}
    match = closest(key, by_key)
    return by_key[match] if match else None


def normalize_key(word: str) -> str:
    """Normalize a key's case and dashes."""
    return word.lower().replace("-", "_")
