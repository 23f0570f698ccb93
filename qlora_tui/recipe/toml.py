"""Reads and writes TOML: converts a file or text to a layer, a layer to a recipe, and a recipe to text.

A layer is a partial recipe as nested dicts, as ``tomllib`` returns it. ``load`` checks the layer that it
reads; :mod:`.layering` merges layers.
"""

from __future__ import annotations

import errno
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from qlora_tui.errors import UsageError, UserError
from qlora_tui.files import read_regular
from qlora_tui.formatting import capitalize
from qlora_tui.recipe import aliases
from qlora_tui.recipe.aliases import closest
from qlora_tui.recipe.fields import Field, fields, get_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.validation import InvalidRecipeError, find_issues, key_lines

_MAX_BYTES = 1_000_000
"""Maximum size of a recipe in bytes.

Recipes have a few KB; a larger file is a model or data given by mistake.
"""

BEFORE: dict[str, Any] = {"quantization.experts": False, "training.auto_micro_batch": False}
"""Values of settings that earlier versions did not have, for runs of those versions. Only values that differ
from the default are listed.
"""

_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


def load(path: Path) -> dict[str, Any]:
    """Load and check the layer in a file.

    Raises UserError, exit code 2, if the file cannot be read or is not TOML. Raises InvalidRecipeError, with
    every error and its line, if a setting is invalid.
    """
    text = read_text(path)
    layer = parse(text, str(path))
    validate(layer, str(path), text)
    return aliases.canonical(layer)


def read_text(path: Path) -> str:
    """Read a small UTF-8 file.

    Raises UserError, exit code 2, if it is missing, a directory, too large, or not UTF-8.
    """
    try:
        content = read_regular(path, _MAX_BYTES + 1)
    except FileNotFoundError:
        raise _read_error(path, "there is no such file", _suggest_path(path)) from None
    except IsADirectoryError:
        raise _read_error(path, "it is a directory", "Name the TOML file in it.") from None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENXIO:
            fix = "Save the recipe as a file."
            raise _read_error(path, "it is a pipe or a device, not a file", fix) from None
        raise _read_error(path, getattr(error, "strerror", None) or str(error), "") from None
    if len(content) > _MAX_BYTES:
        raise _read_error(path, "it is over 1 MB; recipes are small text files", "Name a recipe.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        fix = "Save it as UTF-8 in your editor."
        raise _read_error(path, f"line {line} is not UTF-8 text", fix) from None


def parse(text: str, origin: str) -> dict[str, Any]:
    """Parse a text into a layer without checking its settings.

    Raises UserError, exit code 2, with the line that is not TOML.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        message, line = "it is nested too deeply", 0
    except ValueError as error:
        message = str(error)
        place = _PLACE.search(message)
        line = int(place[1] or text.rstrip().count("\n") + 1) if place else 0
        message = _PLACE.sub("", message)
    excerpt = f" It reads: {_line(text, line)}" if line and _line(text, line) else ""
    raise UsageError(
        "Not TOML",
        what=f"{origin}{f', line {line}' if line else ''}: {message}.{excerpt}",
        fix="Write key = value under a [section]; strings in quotes, true and false in lower case.",
    )


def validate(layer: Mapping[str, Any], origin: str, text: str | None = None) -> None:
    """Raise InvalidRecipeError with all errors in the layer, if there are any.

    ``origin`` is the file or argument that messages name. If ``text``, from which the layer was parsed, is
    given, messages name lines too.
    """
    issues = find_issues(layer, origin)
    if issues:
        raise InvalidRecipeError(find_issues(layer, origin, key_lines(text)) if text is not None else issues)


def to_recipe(layer: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """Build a recipe from the layer over the defaults. Raises InvalidRecipeError."""
    validate(layer, origin)
    return msgspec.convert(aliases.canonical(layer), Recipe, strict=True)


def to_frozen_recipe(layer: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """Build the recipe of a run from the layer in the run's recipe file.

    The file has every setting of the version that wrote it. If a setting is missing, that version did not
    have it. Its value is then the one in :data:`BEFORE`, or the default. Raises InvalidRecipeError.
    """
    complete = dict(layer)
    for path, value in BEFORE.items():
        section, _, key = path.rpartition(".")
        table = layer.get(section)
        if isinstance(table, Mapping) and key not in table:
            complete[section] = {**table, key: value}
    return to_recipe(complete, origin)


def to_layer(recipe: Recipe) -> dict[str, Any]:
    """Return every setting of a recipe as a layer."""
    layer: dict[str, Any] = msgspec.to_builtins(recipe)
    return layer


def dump(recipe: Recipe, comments: bool = False) -> str:
    """Return all settings as TOML. ``comments`` adds the help, valid values and memory effect of each."""
    text = tomli_w.dumps(to_layer(recipe))
    return _commented(text) if comments else text


def override_layer(recipe: Recipe, base: Recipe) -> dict[str, Any]:
    """Return the settings in which ``recipe`` differs from ``base``, as a layer."""
    full = to_layer(recipe)
    layer: dict[str, Any] = {}
    for field in fields().values():
        if get_setting(recipe, field.path) == get_setting(base, field.path):
            continue
        if field.section:
            layer.setdefault(field.section, {})[field.key] = full[field.section][field.key]
        else:
            layer[field.key] = full[field.key]
    return layer


def dump_overrides(recipe: Recipe, base: Recipe) -> str:
    """Return TOML of the settings in which ``recipe`` differs from ``base``; empty if they are equal."""
    return tomli_w.dumps(override_layer(recipe, base))


def _commented(text: str) -> str:
    comments = {
        line: field
        for key, line in key_lines(text).items()
        if (field := fields().get(".".join(map(str, key))))
    }
    written: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if number in comments:
            written += ["", *_comment(comments[number])]
        written.append(line)
    return "\n".join(written).strip() + "\n"


def _comment(field: Field) -> list[str]:
    lines = [f"# {field.help}"]
    if field.kind in ("int", "float", "choice"):
        lines.append(f"# {capitalize(field.expected)}.")
    if field.memory:
        lines.append(f"# Memory: {field.memory}")
    return lines


def _line(text: str, number: int) -> str:
    lines = text.split("\n")
    line = lines[number - 1].strip() if number <= len(lines) else ""
    return line if len(line) <= 60 else line[:59] + "…"


def _read_error(path: Path, why: str, fix: str) -> UserError:
    return UsageError("Cannot read recipe", what=f"{path}: {why}.", fix=fix)


def _suggest_path(path: Path) -> str:
    try:
        match = closest(path.name, sorted(p.name for p in path.parent.glob("*.toml")))
    except OSError:
        return ""
    return f"Did you mean {path.parent / match}?" if match else "Check the path."
