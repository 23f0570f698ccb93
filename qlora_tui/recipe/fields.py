"""The settings as data: what forms, ``--set`` and the reference page are made from."""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from qlora_tui.recipe.schema import Recipe

Kind = Literal["int", "float", "bool", "text", "choice", "texts", "tables"]


class Field(Struct, frozen=True, kw_only=True):
    """One setting as declared in :mod:`qlora_tui.recipe.schema`."""

    path: str
    """``lora.rank``: the TOML table and key."""
    kind: Kind
    label: str
    help: str
    memory: str
    """What it does to memory; empty where it does nothing."""
    default: Any
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    """Smallest value; see ``exclusive_minimum``."""
    maximum: float | None = None
    exclusive_minimum: bool = False
    exclusive_maximum: bool = False

    @property
    def section(self) -> str:
        """``lora`` of ``lora.rank``; empty for ``name`` and ``note``."""
        return self.path.rpartition(".")[0]

    @property
    def key(self) -> str:
        """``rank`` of ``lora.rank``."""
        return self.path.rpartition(".")[2]

    @property
    def expected(self) -> str:
        """What a value must be, in words: ``a whole number from 1 to 1024``."""
        if self.kind == "choice":
            return "one of " + ", ".join(self.choices)
        noun = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "text": "a text in quotes",
            "texts": "a list of texts",
            "tables": "a list of tables",
        }[self.kind]
        low, high = self.minimum, self.maximum
        if low is not None and high is not None and not (self.exclusive_minimum or self.exclusive_maximum):
            return f"{noun} from {low:g} to {high:g}"
        bounds = []
        if low is not None:
            bounds.append(f"{'above' if self.exclusive_minimum else 'at least'} {low:g}")
        if high is not None:
            bounds.append(f"{'below' if self.exclusive_maximum else 'at most'} {high:g}")
        return " ".join([noun, " and ".join(bounds)]).strip()


@cache
def fields() -> dict[str, Field]:
    """Every setting by its path, in the order of declaration."""
    found: dict[str, Field] = {}
    for section in msgspec.structs.fields(Recipe):
        inner = section.default
        if isinstance(inner, Struct):
            for field in _of(type(inner), f"{section.name}."):
                found[field.path] = field
        else:
            found.update({f.path: f for f in _of(Recipe, "") if f.path == section.name})
    return found


def value_of(recipe: Recipe, path: str) -> Any:
    """The value of ``lora.rank`` in a recipe."""
    here: Any = recipe
    for part in path.split("."):
        here = getattr(here, part)
    return here


def with_value(recipe: Recipe, path: str, value: Any) -> Recipe:
    """A copy of the recipe with one setting changed. The value is taken as it is: see ``validate``."""
    section, _, key = path.rpartition(".")
    if not section:
        return msgspec.structs.replace(recipe, **{key: value})
    inner = msgspec.structs.replace(getattr(recipe, section), **{key: value})
    return msgspec.structs.replace(recipe, **{section: inner})


def _of(struct: type[Struct], prefix: str) -> list[Field]:
    hints = get_type_hints(struct, include_extras=True)
    declared = msgspec.structs.fields(struct)
    return [_field(prefix + f.name, hints[f.name], f.default) for f in declared if _is_setting(hints[f.name])]


def _is_setting(hint: Any) -> bool:
    return get_origin(hint) is Annotated


def _field(path: str, hint: Any, default: Any) -> Field:
    type_, meta = get_args(hint)
    assert isinstance(meta, Meta)
    exclusive = {"exclusive_minimum": meta.gt is not None, "exclusive_maximum": meta.lt is not None}
    return Field(
        path=path,
        kind=_kind(type_),
        label=meta.title or path,
        help=meta.description or "",
        memory=(meta.extra or {}).get("memory", ""),
        default=default,
        choices=get_args(type_) if get_origin(type_) is Literal else (),
        minimum=meta.gt if meta.gt is not None else meta.ge,
        maximum=meta.lt if meta.lt is not None else meta.le,
        **exclusive,
    )


def _kind(type_: Any) -> Kind:
    origin = get_origin(type_)
    assert origin not in (Union, UnionType), "a setting has one type"
    if origin is Literal:
        return "choice"
    if origin is tuple:
        return "texts" if get_args(type_)[0] is str else "tables"
    kinds: dict[Any, Kind] = {bool: "bool", int: "int", float: "float", str: "text"}
    return kinds[type_]
