"""Every error in a layer: unknown keys, wrong types, values out of bounds, patterns that do not parse."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from qlora_tui.recipe import aliases, suggestions, targets
from qlora_tui.recipe.errors import RecipeIssue
from qlora_tui.recipe.fields import Field, fields, format_exact, sections, source_fields
from qlora_tui.recipe.toml_lines import Key, line_of

_MAX_SHOWN_CHARS = 40
_PATHS = frozenset(("id", "path", "validation_path", "init_from"))
"""Last path components of settings that may name a file."""
_MAX_PATH_BYTES = 4000
_MAX_NAME_BYTES = 255
"""Maximum length of a Linux file name; looking up a longer one raises an error."""


def find_issues(
    layer: Mapping[str, Any], origin: str, lines: Mapping[Key, int] | None = None
) -> list[RecipeIssue]:
    """Return all errors in file order; with ``lines`` of ``key_lines``, each with its line."""
    issues = []
    for key, path, message, hint in _check_layer(layer):
        issues.append(
            RecipeIssue(origin=origin, path=path, message=message, hint=hint, line=line_of(lines or {}, key))
        )
    return sorted(issues, key=lambda mistake: mistake.line or 0)


_RawIssue = tuple[Key, str, str, str]
"""Key in the layer, path of the setting, what is wrong, what to do."""


def _check_layer(layer: Mapping[str, Any]) -> Iterator[_RawIssue]:
    for name, value in layer.items():
        if name in sections():
            if isinstance(value, Mapping):
                yield from _check_section(name, value)
            else:
                yield (
                    (name,),
                    name,
                    f"{name} must be a section, not {describe_value(value)}",
                    f"write [{name}]",
                )
        elif name in fields():
            yield from _check_value((name,), name, fields()[name], value)
        elif path := aliases.resolve("", name):
            yield from _check_value((name,), name, fields()[path], value)
        elif isinstance(value, Mapping):
            hint = suggestions.did_you_mean(name, sections(), "[{}]") or suggestions.hint_for_key("", name)
            yield (name,), name, f"[{name}] is not a section", hint
        else:
            yield (name,), name, f"{name} is not a setting", suggestions.hint_for_key("", name)
    for section, key, other, path in aliases.duplicates(layer):
        written = f"{section}.{key}" if section else key
        place: Key = (section, key) if section else (key,)
        yield place, written, f"{written} and {other} both set {path}", "keep one of them"


def _check_section(section: str, table: Mapping[str, Any]) -> Iterator[_RawIssue]:
    for key, value in table.items():
        path = f"{section}.{key}"
        if path in fields():
            yield from _check_value((section, key), path, fields()[path], value)
        elif setting := aliases.resolve(section, key):
            yield from _check_value((section, key), path, fields()[setting], value)
        elif not aliases.is_ignored(path, value):
            removed = _hint_for_removed(path, value)
            hint = removed or suggestions.hint_for_key(section, key)
            yield (section, key), path, f"{path} is not a setting{' anymore' if removed else ''}", hint


def _check_value(key: Key, path: str, field: Field, value: Any) -> Iterator[_RawIssue]:
    """Check one value; ``path`` is the key as written, which may be another spelling of the field's."""
    if field.kind == "tables" and isinstance(value, list | tuple):
        yield from _check_sources(key, path, value)
        return
    try:
        msgspec.convert(aliases.canonical_value(field.path, value), field.type, strict=True)
    except msgspec.ValidationError:
        yield (
            key,
            path,
            f"{path} must be {field.expected}, not {describe_value(value)}",
            _hint_for_value(field, value),
        )
        return
    if field.key in _PATHS and _is_too_long(value):
        yield key, path, f"{path} is too long for a path: {describe_value(value)}", ""
    if field.path in targets.SETTINGS:
        for pattern in value:
            error_and_hint = targets.syntax_error(pattern)
            if error_and_hint:
                yield key, path, f"{path}: {error_and_hint[0]}", error_and_hint[1]


def _is_too_long(path: str) -> bool:
    content = path.encode(errors="surrogateescape")
    return len(content) > _MAX_PATH_BYTES or max(map(len, content.split(b"/"))) > _MAX_NAME_BYTES


def _check_sources(key: Key, path: str, tables: list[Any] | tuple[Any, ...]) -> Iterator[_RawIssue]:
    allowed = source_fields()
    for index, table in enumerate(tables):
        table_key, name = (*key, index), f"{path}[{index + 1}]"
        if not isinstance(table, Mapping):
            hint = f"write {{ path = {describe_value(table)} }}" if isinstance(table, str) else ""
            yield table_key, name, f"{name} must be a table, not {describe_value(table)}", hint
            continue
        for inner, value in table.items():
            if inner in allowed:
                yield from _check_value((*table_key, inner), f"{name}.{inner}", allowed[inner], value)
            else:
                hint = suggestions.did_you_mean(inner, allowed) or "a source takes " + ", ".join(allowed)
                yield (*table_key, inner), f"{name}.{inner}", f"{name}.{inner} is not a setting", hint
        for inner, field in allowed.items():
            if field.required and inner not in table:
                yield table_key, name, f"{name} has no {inner}", f"add {inner} = …, {field.expected}"


def _hint_for_removed(path: str, value: Any) -> str:
    return aliases.REMOVED.get(path, {}).get(value, "") if isinstance(value, str) else ""


def _hint_for_value(field: Field, value: Any) -> str:
    if hint := _hint_for_removed(field.path, value):
        return hint
    if field.kind == "choice" and isinstance(value, str):
        return suggestions.did_you_mean(value, field.choices, '"{}"')
    if field.kind == "texts" and isinstance(value, str):
        return f"write [{describe_value(value)}]"
    if field.kind == "tables" and isinstance(value, str):
        return f"write [{{ path = {describe_value(value)} }}]"
    if field.kind == "int" and isinstance(value, float) and value.is_integer() and _fits(field, int(value)):
        return f"write {int(value)}"
    if field.kind in ("int", "float", "bool") and isinstance(value, str) and _fits(field, _unquoted(value)):
        return f"write {value.lower()}" + ("" if field.kind == "bool" else ", without quotes")
    return ""


def _unquoted(text: str) -> Any:
    """Return the value that ``text`` would be without quotes; None if it is not valid TOML then."""
    try:
        table = tomllib.loads(f"value = {text.lower()}")
    except (ValueError, RecursionError):
        return None
    return table["value"] if len(table) == 1 and "\n" not in text else None


def _fits(field: Field, value: Any) -> bool:
    try:
        msgspec.convert(aliases.canonical_value(field.path, value), field.type, strict=True)
    except msgspec.ValidationError:
        return False
    return True


def describe_value(value: Any) -> str:
    """Format an invalid value as in the file, shortened."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return f"{value:,}" if abs(value) < 10**18 else "a number too large to read"
        case float():
            return format_exact(value) if value == value else "nan"
        case str():
            text = value if len(value) <= _MAX_SHOWN_CHARS else value[: _MAX_SHOWN_CHARS - 1] + "…"
            return msgspec.json.encode(text.encode("utf-8", "replace").decode()).decode()
        case []:
            return "an empty list"
        case list() | tuple():
            return "a list"
        case Mapping():
            return "a table"
        case datetime.datetime() | datetime.date() | datetime.time():
            return "a date or time"
        case _:
            return "something else"
