"""Every mistake in a layer: unknown keys, wrong types, values out of bounds, patterns that do not parse."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from qlora_tui.recipe import near, targets
from qlora_tui.recipe.fields import Field, fields, number, sections, source_fields
from qlora_tui.recipe.lines import Key, line_of
from qlora_tui.recipe.mistakes import Mistake

_LONGEST_SHOWN = 40
_PATHS = frozenset(("id", "path", "validation_path"))
"""Last parts of the settings that may name a file."""
_LONGEST_PATH_BYTES = 4000
_LONGEST_NAME_BYTES = 255
"""No Linux file system takes more; looking for such a file is an error of its own."""


def mistakes_in(
    layer: Mapping[str, Any], origin: str, lines: Mapping[Key, int] | None = None
) -> list[Mistake]:
    """All of them, in the order of the file; with ``lines`` of ``key_lines``, each with its line."""
    found = []
    for key, path, says, hint in _in_layer(layer):
        found.append(Mistake(origin=origin, path=path, says=says, hint=hint, line=line_of(lines or {}, key)))
    return sorted(found, key=lambda mistake: mistake.line or 0)


_Finding = tuple[Key, str, str, str]
"""Where in the layer, the setting's path, what is wrong, what to do."""


def _in_layer(layer: Mapping[str, Any]) -> Iterator[_Finding]:
    for name, value in layer.items():
        if name in sections():
            if isinstance(value, Mapping):
                yield from _in_section(name, value)
            else:
                yield (name,), name, f"{name} must be a section, not {shown(value)}", f"write [{name}]"
        elif name in fields():
            yield from _in_value((name,), name, fields()[name], value)
        elif isinstance(value, Mapping):
            hint = near.did_you_mean(name, sections(), "[{}]") or near.hint_for_key("", name)
            yield (name,), name, f"[{name}] is not a section", hint
        else:
            yield (name,), name, f"{name} is not a setting", near.hint_for_key("", name)


def _in_section(section: str, table: Mapping[str, Any]) -> Iterator[_Finding]:
    for key, value in table.items():
        path = f"{section}.{key}"
        if path in fields():
            yield from _in_value((section, key), path, fields()[path], value)
        else:
            yield (section, key), path, f"{path} is not a setting", near.hint_for_key(section, key)


def _in_value(key: Key, path: str, field: Field, value: Any) -> Iterator[_Finding]:
    if field.kind == "tables" and isinstance(value, list | tuple):
        yield from _in_sources(key, path, value)
        return
    try:
        msgspec.convert(value, field.type, strict=True)
    except msgspec.ValidationError:
        yield key, path, f"{path} must be {field.expected}, not {shown(value)}", _hint_for_value(field, value)
        return
    if path.rpartition(".")[2] in _PATHS and _is_too_long(value):
        yield key, path, f"{path} is too long for a path: {shown(value)}", ""
    if path in targets.SETTINGS:
        for pattern in value:
            trouble = targets.syntax_error(pattern)
            if trouble:
                yield key, path, f"{path}: {trouble[0]}", trouble[1]


def _is_too_long(path: str) -> bool:
    content = path.encode(errors="surrogateescape")
    return len(content) > _LONGEST_PATH_BYTES or max(map(len, content.split(b"/"))) > _LONGEST_NAME_BYTES


def _in_sources(key: Key, path: str, tables: list[Any] | tuple[Any, ...]) -> Iterator[_Finding]:
    known = source_fields()
    for index, table in enumerate(tables):
        here, name = (*key, index), f"{path}[{index + 1}]"
        if not isinstance(table, Mapping):
            hint = f"write {{ path = {shown(table)} }}" if isinstance(table, str) else ""
            yield here, name, f"{name} must be a table, not {shown(table)}", hint
            continue
        for inner, value in table.items():
            if inner in known:
                yield from _in_value((*here, inner), f"{name}.{inner}", known[inner], value)
            else:
                hint = near.did_you_mean(inner, known) or "a source takes " + ", ".join(known)
                yield (*here, inner), f"{name}.{inner}", f"{name}.{inner} is not a setting", hint
        for inner, field in known.items():
            if field.required and inner not in table:
                yield here, name, f"{name} has no {inner}", f"add {inner} = …, {field.expected}"


def _hint_for_value(field: Field, value: Any) -> str:
    if field.kind == "choice" and isinstance(value, str):
        return near.did_you_mean(value, field.choices, '"{}"')
    if field.kind == "texts" and isinstance(value, str):
        return f"write [{shown(value)}]"
    if field.kind == "tables" and isinstance(value, str):
        return f"write [{{ path = {shown(value)} }}]"
    if field.kind == "int" and isinstance(value, float) and value.is_integer() and _fits(field, int(value)):
        return f"write {int(value)}"
    if field.kind in ("int", "float", "bool") and isinstance(value, str) and _fits(field, _bare(value)):
        return f"write {value.lower()}" + ("" if field.kind == "bool" else ", without quotes")
    return ""


def _bare(text: str) -> Any:
    """What ``text`` would be without its quotes; None where it would be nothing."""
    try:
        table = tomllib.loads(f"value = {text.lower()}")
    except (ValueError, RecursionError):
        return None
    return table["value"] if len(table) == 1 and "\n" not in text else None


def _fits(field: Field, value: Any) -> bool:
    try:
        msgspec.convert(value, field.type, strict=True)
    except msgspec.ValidationError:
        return False
    return True


def shown(value: Any) -> str:
    """What was found, as the file has it, and short."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return f"{value:,}" if abs(value) < 10**18 else "a number beyond all bounds"
        case float():
            return number(value) if value == value else "nan"
        case str():
            text = value if len(value) <= _LONGEST_SHOWN else value[: _LONGEST_SHOWN - 1] + "…"
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
