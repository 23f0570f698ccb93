"""Builds a recipe from layers (defaults < preset < the user's file < ``--set``); makes paths absolute."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from qlora_tui.recipe import aliases, conflicts, targets, toml
from qlora_tui.recipe.fields import Field, fields, sections
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.validation import InvalidRecipeError, RecipeIssue, find_issues

_MAX_SHOWN_CHARS = 200
"""Maximum number of characters of an argument that a message repeats."""


def build_recipe(
    *,
    preset: str | None = None,
    file: Path | None = None,
    layer: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    model: str | None = None,
    data: Sequence[str] = (),
) -> Recipe:
    """Build a recipe from the arguments of a command, and check it, including for conflicts.

    ``layer`` has already been checked; it overrides ``file``. ``model`` and ``data`` set ``model.id`` and
    ``data.sources``, and a model other than the file's resets ``model.revision`` to ``main``. ``sets`` has
    ``section.key=value`` arguments, which override everything else. Each layer is checked separately, so that
    an error names the file or the argument. Raises UserError, exit code 2. See also
    ``conflicts.require_runnable``.
    """
    recipe: dict[str, Any] = {}
    if preset is not None:
        from qlora_tui.recipe.presets import find_preset  # importing it takes half of the import time

        recipe = merge_layers(recipe, find_preset(preset).settings())
    if file is not None:
        recipe = merge_layers(recipe, toml.load(file))
    recipe = merge_layers(recipe, layer or {})
    recipe = merge_layers(recipe, _argument_layer(recipe, sets, model, data))
    built = toml.to_recipe(recipe)
    conflicts.check_conflicts(built)
    return built


def merge_layers(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a layer over another: sections are merged key by key, other values are replaced."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        both_tables = isinstance(value, Mapping) and isinstance(under, Mapping)
        result[key] = {**under, **value} if both_tables else value  # type: ignore[dict-item]  # both are mappings
    return result


def parse_override(argument: str) -> dict[str, Any]:
    """Parse one ``section.key=value`` into a layer, and check it. Raises InvalidRecipeError if it is invalid.

    The value is TOML, but a text needs no quotes: ``training.lr_scheduler=linear``. Target patterns can be
    comma-separated, and so can ranks or alphas by pattern: ``q_proj=32,8-23.v_proj=8``. Any other list
    without brackets is read as a single item.
    """
    layer, issues = _parse_set(argument)
    if issues:
        raise InvalidRecipeError(issues)
    return aliases.canonical(layer)


def _argument_layer(
    below: Mapping[str, Any],
    sets: Sequence[str],
    model: str | None,
    data: Sequence[str],
) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    issues: list[RecipeIssue] = []
    if model is not None:
        layer = {"model": {"id": model}}
        if below.get("model", {}).get("id") != model:
            layer["model"]["revision"] = "main"  # the file's revision belongs to another model
        issues += _check_text("--model", "model.id", model)
    if data:
        sources = {"data": {"sources": [{"path": path} for path in data]}}
        layer = merge_layers(layer, sources)
        for path in data:
            issues += _check_text("--data", "data.sources", path)
    for argument in sets:
        override, override_issues = _parse_set(argument)
        layer = merge_layers(layer, aliases.canonical(override))
        issues += override_issues
    if issues:
        raise InvalidRecipeError(issues)
    return layer


def _check_text(origin: str, path: str, text: str) -> list[RecipeIssue]:
    if not text.strip():
        return [RecipeIssue(origin=origin, path=path, message="it is empty")]
    return _check_utf8(origin, path, text)


def _check_utf8(origin: str, path: str, text: str) -> list[RecipeIssue]:
    """Return an issue if an argument is not valid UTF-8, because a recipe cannot contain such text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        message, hint = f'"{_printable(text)}" is not UTF-8', "rename the file"
        return [RecipeIssue(origin=origin, path=path, message=message, hint=hint)]
    return []


def _parse_set(argument: str) -> tuple[dict[str, Any], list[RecipeIssue]]:
    path, equals, raw = argument.partition("=")
    path = path.strip()
    excerpt = _printable(argument[: _MAX_SHOWN_CHARS + 1])
    origin = f"--set {excerpt if len(argument) <= _MAX_SHOWN_CHARS else excerpt[:-1] + '…'}"
    issues = _check_utf8(origin, path, argument)
    if issues:
        return {}, issues
    if not equals:
        message, hint = "it has no value", f"write --set {path or 'section.key'}=value"
        return {}, [RecipeIssue(origin=origin, path=path, message=message, hint=hint)]
    if path in sections():
        keys = ", ".join(field.path for field in fields().values() if field.section == path)
        message, hint = f"{path} is a section, not a setting", f"name one of {keys}"
        return {}, [RecipeIssue(origin=origin, path=path, message=message, hint=hint)]
    section, _, key = path.rpartition(".")
    field = fields().get(path)
    if field is None and path in aliases.REMOVED:
        return {}, find_issues({section: {key: _unquoted_text(raw.strip())}}, origin)
    if field is None:
        short_path = path if len(path) <= _MAX_SHOWN_CHARS else f"{path[:_MAX_SHOWN_CHARS]}…"
        return {}, [_unknown_setting(origin, short_path)]
    value = _parse_value(field, raw.strip())
    layer = {section: {key: value}} if section else {key: value}
    issues = find_issues(layer, origin)
    return ({}, issues) if issues else (layer, [])


def _unknown_setting(origin: str, path: str) -> RecipeIssue:
    section, _, key = path.rpartition(".")
    if section and section not in sections() and key not in aliases.ALIASES:
        hint = aliases.did_you_mean(path, fields()) or aliases.hint_for_key("", key)
    else:
        homes = [field.path for field in fields().values() if field.key == aliases.normalize_key(key)]
        hint = f"did you mean {homes[0]}?" if homes else aliases.hint_for_key(section, key)
    message = f"{_printable(path)} is not a setting" if path else "it names no setting"
    return RecipeIssue(origin=origin, path=path, message=message, hint=hint)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text.encode("utf-8", "replace").decode())


def _parse_value(field: Field, raw: str) -> Any:
    """Parse the value of a ``--set`` argument: TOML, or a short form that :func:`parse_override` describes.

    Text that is not TOML is returned as it is.
    """
    match field.kind:
        case "text" | "choice":
            return _parse_toml_value(raw) if raw[:1] in ("'", '"') else raw
        case "texts" if not raw.startswith("["):
            return (
                targets.split_patterns(raw)
                if field.path in (targets.SETTINGS[0], targets.SKIP)
                else [_unquoted_text(raw)]
            )
        case "numbers" if not raw.startswith("{"):
            pairs = [part.partition("=") for part in targets.split_patterns(raw) if part]
            return {pattern.strip(): _parse_toml_value(value.strip()) for pattern, _, value in pairs}
        case "tables" if not raw.startswith("["):
            return [{"path": _unquoted_text(raw)}]
        case _:
            return _parse_toml_value(raw)


def _unquoted_text(raw: str) -> Any:
    return _parse_toml_value(raw) if raw[:1] in ("'", '"') else raw


def _parse_toml_value(raw: str) -> Any:
    """Parse one TOML value; return the text itself if it is not TOML."""
    try:
        table = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw
    return table["value"] if len(table) == 1 else raw


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths of local files, because a run has another working directory.

    Values that are not local files (such as a Hub ID) stay unchanged.
    """
    data = recipe.data
    return msgspec.structs.replace(
        recipe,
        model=msgspec.structs.replace(recipe.model, id=_absolute(recipe.model.id)),
        data=msgspec.structs.replace(
            data,
            sources=tuple(msgspec.structs.replace(s, path=_absolute(s.path)) for s in data.sources),
            validation_path=_absolute(data.validation_path),
        ),
    )


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if name and path.exists() else name
