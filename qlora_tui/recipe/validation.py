"""Finds every error in a layer, with its line: unknown keys, wrong types, bad values and bad patterns.

``tomllib`` does not report line numbers. To find them, this module scans texts that ``tomllib`` has accepted
for table headers and ``key =``. If the scan misses a key, an error in it has the line of the closest
enclosing table, if that is known.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from qlora_tui.errors import UsageError
from qlora_tui.formatting import capitalize, format_number
from qlora_tui.recipe import aliases, targets
from qlora_tui.recipe.fields import Field, fields, sections, source_fields

_MAX_SHOWN = 20
"""Maximum number of issues shown, because a file with more is probably not a recipe."""
Key = tuple[str | int, ...]
"""Key as a path of names and indices: ``("lora", "rank")``; ``("data", "sources", 0, "path")``."""
_OPAQUE = re.compile(
    r'"""(?:\\.|[^\\])*?"""+' r"|'''.*?'''+" r'|"(?:\\.|[^"\\\n])*"' r"|'[^'\n]*'" r"|#[^\n]*",
    re.DOTALL,
)
"""Pattern of strings and comments, in which brackets and equals signs have no meaning."""
_SYNTAX = re.compile(r"[\[\]{}=#.,\"']")
_NAME = r"[\w-]+(?:\s*\.\s*[\w-]+)*"
_HEADER = re.compile(rf"\s*(\[\[?)\s*({_NAME})\s*\]")
_ASSIGNMENT = re.compile(rf"\s*({_NAME})\s*=")
_MAX_SHOWN_CHARS = 40
_PATHS = frozenset(("id", "path", "validation_path", "init_from"))
"""Last components of the setting paths, such as ``model.id``, whose values may be file paths."""
_MAX_PATH_BYTES = 4000
_MAX_NAME_BYTES = 255
"""Maximum length of a Linux file name in bytes; looking up a longer name raises an error."""
_RawIssue = tuple[Key, str, str, str]
"""Key in the layer, path of the setting, the error, and the fix."""


class RecipeIssue(Struct, frozen=True):
    """One error in a recipe: its place, and the probable fix."""

    origin: str
    """The file, or the argument such as ``--set lora.rank=x``."""
    path: str
    """Path of the setting or section as written, such as ``lora.rank``; empty if the argument with the error
    has no path.
    """
    message: str
    """The error: ``lora.rank must be a whole number from 1 to 1,024, not "x"``."""
    hint: str = ""
    """The fix: ``did you mean lora.rank?``"""
    line: int | None = None
    """Line number, from 1; None if unknown."""

    @property
    def where(self) -> str:
        return self.origin if self.line is None else f"{self.origin}, line {self.line}"

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f"; {self.hint}" if self.hint else "")


class InvalidRecipeError(UsageError):
    """Raised for an invalid recipe, preset or ``--set``."""

    def __init__(self, issues: Sequence[RecipeIssue]):
        self.issues = tuple(issues)
        if len(issues) == 1:
            [only] = issues
            super().__init__(
                "Invalid recipe",
                what=f"{only.where}: {only.message}",
                fix=capitalize(only.hint),
            )
            return
        lines = [str(mistake) for mistake in issues[:_MAX_SHOWN]]
        if len(issues) > _MAX_SHOWN:
            lines.append(f"and {len(issues) - _MAX_SHOWN} more")
        super().__init__(
            "Invalid recipe",
            what="\n  ".join([f"{len(issues)} mistakes", *lines]),
        )


def key_lines(text: str) -> dict[Key, int]:
    """Return the line of each key and table, from 1. Keys of inline tables are not included."""
    line_numbers: dict[Key, int] = {}
    arrays: dict[Key, int] = {}
    table: Key = ()
    depth = 0
    for number, line in enumerate(_OPAQUE.sub(_blank, text).split("\n"), start=1):
        header = _HEADER.match(line) if depth == 0 else None
        if header:
            table = _inside_arrays(_parts(header[2]), arrays)
            if header[1] == "[[":
                line_numbers.setdefault(table, number)
                arrays[table] = arrays.get(table, -1) + 1
                table = (*table, arrays[table])
            line_numbers[table] = number
            continue
        assignment = _ASSIGNMENT.match(line) if depth == 0 else None
        if assignment:
            parts = _parts(assignment[1])
            for end in range(1, len(parts) + 1):
                line_numbers.setdefault(table + parts[:end], number)
        depth += sum(line.count(mark) for mark in "[{") - sum(line.count(mark) for mark in "]}")
    return line_numbers


def line_of(lines: Mapping[Key, int], key: Key) -> int | None:
    """Return the line of ``key``, or of the closest enclosing table; None if unknown."""
    while key:
        if key in lines:
            return lines[key]
        key = key[:-1]
    return None


def _blank(match: re.Match[str]) -> str:
    text = match[0]
    return "" if text.startswith("#") else _SYNTAX.sub("", text)


def _parts(dotted: str) -> Key:
    return tuple(part.strip() for part in dotted.split("."))


def _inside_arrays(parts: Key, arrays: dict[Key, int]) -> Key:
    """Return the path with indices of arrays inserted. For example, ``data.sources.columns`` below
    ``[[data.sources]]`` refers to the last source.
    """
    key: Key = ()
    for position, part in enumerate(parts):
        key = (*key, part)
        if position < len(parts) - 1 and key in arrays:
            key = (*key, arrays[key])
    return key


def find_issues(
    layer: Mapping[str, Any], origin: str, lines: Mapping[Key, int] | None = None
) -> list[RecipeIssue]:
    """Return all errors in file order; with ``lines`` from ``key_lines``, each error has its line."""
    issues = []
    for key, path, message, hint in _check_layer(layer):
        issues.append(
            RecipeIssue(origin=origin, path=path, message=message, hint=hint, line=line_of(lines or {}, key))
        )
    return sorted(issues, key=lambda mistake: mistake.line or 0)


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
        elif isinstance(value, Mapping):
            hint = aliases.did_you_mean(name, sections(), "[{}]") or aliases.hint_for_key("", name)
            yield (name,), name, f"[{name}] is not a section", hint
        else:
            yield (name,), name, f"{name} is not a setting", aliases.hint_for_key("", name)


def _check_section(section: str, table: Mapping[str, Any]) -> Iterator[_RawIssue]:
    for key, value in table.items():
        path = f"{section}.{key}"
        if path in fields():
            yield from _check_value((section, key), path, fields()[path], value)
        elif not aliases.is_ignored(path, value):
            removed = _hint_for_removed(path, value)
            hint = removed or aliases.hint_for_key(section, key)
            yield (section, key), path, f"{path} is not a setting{' anymore' if removed else ''}", hint


def _check_value(key: Key, path: str, field: Field, value: Any) -> Iterator[_RawIssue]:
    """Check one value; ``path`` is the key as written, such as ``data.sources[1].weight``."""
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
        yield key, path, f"{path} is longer than a file path can be: {describe_value(value)}", ""
    if field.path in (*targets.SETTINGS, targets.SKIP):
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
                hint = aliases.did_you_mean(inner, allowed) or "a source takes " + ", ".join(allowed)
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
        return aliases.did_you_mean(value, field.choices, '"{}"')
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
    """Return the TOML value that ``text`` would be in lower case, without quotes; None if it is not one."""
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
    """Describe an invalid value: a short form of the value, or its kind, such as ``a list``."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return f"{value:,}" if abs(value) < 10**18 else "a number too large to read"
        case float():
            return format_number(value) if value == value else "nan"
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
