"""One recipe from its layers: defaults < preset < the user's file < ``--set``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_tui.recipe import conflicts, near, targets, toml
from qlora_tui.recipe.fields import Field, fields, sections
from qlora_tui.recipe.mistakes import InvalidRecipe, Mistake
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.validation import mistakes_in

_LONGEST_SHOWN = 200
"""Characters of an argument that a message repeats."""


def build(
    *,
    preset: str | None = None,
    file: Path | None = None,
    sets: Sequence[str] = (),
    model: str | None = None,
    data: Sequence[str] = (),
) -> Recipe:
    """The recipe of a command line, checked, conflicts included.

    ``sets`` are ``section.key=value``; ``model`` and ``data`` stand for ``model.id`` and ``data.sources`` and
    yield to a ``--set`` of these. Each layer is checked against its own origin, so that an error names the
    file or the argument. Raises Problem, exit code 2. See also ``conflicts.ready_to_run``.
    """
    recipe: dict[str, Any] = {}
    if preset is not None:
        from qlora_tui.recipe.presets import find  # with platformdirs it costs as much as all the rest

        recipe = merged(recipe, find(preset).settings())
    if file is not None:
        recipe = merged(recipe, toml.load(file))
    recipe = merged(recipe, _arguments(recipe, sets, model, data))
    built = toml.to_recipe(recipe)
    conflicts.check(built)
    return built


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A layer over another: sections key by key, lists and all else as a whole."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        both = isinstance(value, Mapping) and isinstance(under, Mapping)
        result[key] = {**under, **value} if both else value  # type: ignore[dict-item]  # both are mappings
    return result


def parse_set(argument: str) -> dict[str, Any]:
    """The layer of one ``section.key=value``, checked.

    The value is TOML, but needs no quotes: ``training.schedule=linear``. A list of target modules may be a
    comma list, and so may ranks by pattern: ``q_proj=32,8-23.v_proj=8``. Any other list needs brackets, or is
    taken as its one item. Raises InvalidRecipe.
    """
    layer, mistakes = _set(argument)
    if mistakes:
        raise InvalidRecipe(mistakes)
    return layer


def _arguments(
    below: Mapping[str, Any], sets: Sequence[str], model: str | None, data: Sequence[str]
) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    mistakes: list[Mistake] = []
    if model is not None:
        layer = {"model": _model(below, model)}
        mistakes += _text_mistakes("--model", "model.id", model)
    if data:
        sources = {"data": {"sources": [{"path": path} for path in data]}}
        layer = merged(layer, sources)
        for path in data:
            mistakes += _text_mistakes("--data", "data.sources", path)
    for argument in sets:
        one, wrong = _set(argument)
        layer = merged(layer, one)
        mistakes += wrong
    if mistakes:
        raise InvalidRecipe(mistakes)
    return layer


def _model(below: Mapping[str, Any], id_: str) -> dict[str, Any]:
    """A revision of the file's model is none of another model's."""
    same = below.get("model", {}).get("id") == id_
    return {"id": id_} if same else {"id": id_, "revision": "main"}


def _text_mistakes(origin: str, path: str, text: str) -> list[Mistake]:
    if not text.strip():
        return [Mistake(origin=origin, path=path, says="it is empty")]
    return _undecodable(origin, path, text)


def _undecodable(origin: str, path: str, text: str) -> list[Mistake]:
    """What the shell passed may be no text at all; a recipe could not hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        says, hint = f'"{_printable(text)}" is not UTF-8', "give the file a name that is"
        return [Mistake(origin=origin, path=path, says=says, hint=hint)]
    return []


def _set(argument: str) -> tuple[dict[str, Any], list[Mistake]]:
    path, equals, raw = argument.partition("=")
    path = path.strip()
    given = _printable(argument[: _LONGEST_SHOWN + 1])
    origin = f"--set {given if len(argument) <= _LONGEST_SHOWN else given[:-1] + '…'}"
    wrong = _undecodable(origin, path, argument)
    if wrong:
        return {}, wrong
    if not equals:
        says, hint = "it has no value", f"write --set {path or 'section.key'}=value"
        return {}, [Mistake(origin=origin, path=path, says=says, hint=hint)]
    if path in sections():
        keys = ", ".join(field.path for field in fields().values() if field.section == path)
        says, hint = f"{path} is a section, not a setting", f"name one of {keys}"
        return {}, [Mistake(origin=origin, path=path, says=says, hint=hint)]
    field = fields().get(path)
    if field is None:
        shown = path if len(path) <= _LONGEST_SHOWN else f"{path[:_LONGEST_SHOWN]}…"
        return {}, [_unknown(origin, shown)]
    value = _value(field, raw.strip())
    layer = {field.section: {field.key: value}} if field.section else {field.key: value}
    wrong = mistakes_in(layer, origin)
    return ({}, wrong) if wrong else (layer, [])


def _unknown(origin: str, path: str) -> Mistake:
    section, _, key = path.rpartition(".")
    if section and section not in sections():
        hint = near.did_you_mean(path, fields()) or near.hint_for_key("", key)
    else:
        homes = [field.path for field in fields().values() if field.key == near.plain(key)]
        hint = f"did you mean {homes[0]}?" if homes else near.hint_for_key(section, key)
    says = f"{_printable(path)} is not a setting" if path else "it names no setting"
    return Mistake(origin=origin, path=path, says=says, hint=hint)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text.encode("utf-8", "replace").decode())


def _value(field: Field, raw: str) -> Any:
    """``raw`` as TOML where it is that, or as the bare text it is."""
    match field.kind:
        case "text" | "choice":
            return _toml(raw) if raw[:1] in ("'", '"') else raw
        case "texts" if not raw.startswith("["):
            return targets.split(raw) if field.path == "lora.target_modules" else [_bare_text(raw)]
        case "numbers" if not raw.startswith("{"):
            pairs = [part.partition("=") for part in targets.split(raw) if part]
            return {pattern.strip(): _toml(value.strip()) for pattern, _, value in pairs}
        case "tables" if not raw.startswith("["):
            return [{"path": _bare_text(raw)}]
        case _:
            return _toml(raw)


def _bare_text(raw: str) -> Any:
    return _toml(raw) if raw[:1] in ("'", '"') else raw


def _toml(raw: str) -> Any:
    """One TOML value; the text itself where it is none."""
    try:
        table = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw
    return table["value"] if len(table) == 1 else raw
