"""Settings of a recipe or another struct as data for forms, ``--set``, comparisons and the reference page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from qlora_tui.formatting import format_number, pluralize, uncapitalize
from qlora_tui.recipe.schema import Recipe, Source

Kind = Literal["int", "float", "bool", "text", "choice", "texts", "tables", "names", "numbers"]
"""How a value is edited.

``tables`` is a list of :class:`.Source`; ``names`` maps text to text, ``numbers`` maps patterns to numbers.
"""
WITHOUT_EFFECT_ON_WEIGHTS = (
    "name",
    "note",
    "training.first_step_differs",
    "training.log_every",
    "training.eval_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.early_stopping",
    "training.sample_prompts",
    "training.general_prompts",
    "training.task_prompts",
    "training.forgetting_weight",
    "training.gradient_checkpointing",
    "quantization.streamed_layers",
    "training.gpus",
)
"""Settings that do not change what a training step computes.

They concern names, evaluations, checkpoints, when to stop, and the use of memory and GPUs.
"""
DESCRIPTIVE = frozenset(("name", "note"))
"""Settings that describe the recipe without affecting the run."""


class Field(Struct, frozen=True, kw_only=True):
    """One setting as a struct declares it, in :mod:`qlora_tui.recipe.schema` or in the app's settings."""

    path: str
    """TOML table and key: ``lora.rank``."""
    kind: Kind
    label: str
    help: str
    memory: str
    """Effect of the setting on memory; empty if there is none."""
    default: Any
    """``msgspec.NODEFAULT`` for a required setting."""
    type: Any
    """The annotated type, for ``msgspec.convert``."""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    """Minimum value; see ``exclusive_minimum``."""
    maximum: float | None = None
    exclusive_minimum: bool = False
    exclusive_maximum: bool = False
    min_length: int = 0
    """Minimum length, in characters of a text or items of a list."""
    max_length: int | None = None

    @property
    def section(self) -> str:
        """Return ``lora`` for ``lora.rank``; empty for ``name`` and ``note``."""
        return self.path.rpartition(".")[0]

    @property
    def key(self) -> str:
        """Return ``rank`` for ``lora.rank``."""
        return self.path.rpartition(".")[2]

    @property
    def required(self) -> bool:
        return self.default is msgspec.NODEFAULT

    @property
    def expected(self) -> str:
        """Return a description of valid values: ``a whole number from 1 to 1,024``."""
        match self.kind:
            case "choice":
                return "one of " + ", ".join(self.choices)
            case "int" | "float":
                return f"{'a whole number' if self.kind == 'int' else 'a number'} {self._bounds}".rstrip()
            case "bool":
                return "true or false"
            case "text":
                return f"a {self._filled}string in quotes{self._lengths('character')}"
            case "texts":
                return f"a {self._filled}list of strings{self._lengths('item')}"
            case "tables":
                return "a list of tables"
            case "names":
                return "a table of strings"
            case "numbers":
                return "a table of target patterns and numbers within the setting's bounds"

    @property
    def full_help(self) -> str:
        """What the setting does, and its effect on memory if it has one."""
        return self.help + (f" Memory: {self.memory}" if self.memory else "")

    @property
    def zero_meaning(self) -> str:
        """Return the meaning of 0 if the help states it, such as ``no limit``; otherwise empty."""
        match = re.search(r"\b0: (.+?)\.(?: |$)", self.help)
        return match[1] if match else ""

    def describe(self, value: Any) -> str:
        """Format a value for people. A 0 with a special meaning is written as that meaning: ``no limit``."""
        is_zero = value == 0 and not isinstance(value, bool)
        return (self.zero_meaning if is_zero else "") or format_value(value)

    @property
    def _bounds(self) -> str:
        low, high, below = self.minimum, self.maximum, self.exclusive_maximum
        if self.kind == "int" and high is not None and below:
            high, below = high - 1, False
        if low is None:
            return "" if high is None else f"{'below' if below else 'of at most'} {format_number(high)}"
        if high is None:
            return (
                f"above {format_number(low)}"
                if self.exclusive_minimum
                else f"of at least {format_number(low)}"
            )
        if self.exclusive_minimum:
            return f"above {format_number(low)} and {'below' if below else 'at most'} {format_number(high)}"
        return f"from {format_number(low)} to {'below ' if below else ''}{format_number(high)}"

    @property
    def _filled(self) -> str:
        return "non-empty " if self.min_length == 1 else ""

    def _lengths(self, unit: str) -> str:
        parts = []
        if self.min_length > 1:
            parts.append(f"at least {pluralize(self.min_length, unit)}")
        if self.max_length is not None:
            parts.append(f"at most {pluralize(self.max_length, unit)}")
        return " of " + " and ".join(parts) if parts else ""


def fields() -> dict[str, Field]:
    """Return every setting of a recipe by its path, in the order of declaration."""
    return fields_of(Recipe)


@cache
def fields_of(struct: type[Struct]) -> dict[str, Field]:
    """Return every setting that a struct or a nested struct declares, keyed by path, in order of declaration.

    A setting is a field with a ``Meta`` that has a title.
    """
    hints = get_type_hints(struct, include_extras=True)
    declared: dict[str, Field] = {}
    for member in msgspec.structs.fields(struct):
        if isinstance(member.default, Struct):
            for path, field in fields_of(type(member.default)).items():
                inner_path = f"{member.name}.{path}"
                declared[inner_path] = msgspec.structs.replace(field, path=inner_path)
        elif any(meta.title for meta in _metas(hints[member.name])):
            declared[member.name] = _field(member, hints[member.name])
    return declared


@cache
def sections() -> tuple[str, ...]:
    """Return the names of the sections: ``model``, ``quantization``, ``lora``, ``data``, ``training``."""
    return tuple(dict.fromkeys(field.section for field in fields().values() if field.section))


def setting_name(path: str) -> str:
    """Return a setting's name for use within a sentence: ``learning rate`` for ``training.learning_rate``."""
    return uncapitalize(fields()[path].label)


def name_settings(text: str) -> str:
    """Replace the path of each setting in ``text``, which people read, with the label that forms show.

    ``Lower training.learning_rate`` and ``Lower Learning rate (training.learning_rate)`` both become
    ``Lower Learning rate``. Paths in commands, such as ``--set lora.rank=8``, are kept.
    """

    def name(match: re.Match[str]) -> str:
        field = fields().get(match[1] or match[2])
        return match[0] if field is None else "" if match[1] else field.label

    return _paths().sub(name, text)


def label_settings(text: str) -> str:
    """Add the label that forms show to the path of each setting in ``text``, which people read.

    ``training.epochs must be above 0`` becomes ``Epochs (training.epochs) must be above 0``. Where a path
    occurs again, it is replaced with the label.
    """
    seen = set[str]()

    def name(match: re.Match[str]) -> str:
        path = match[1] or match[2]
        field, is_new = fields().get(path), path not in seen
        seen.add(path)
        if field is None:
            return match[0]
        if match[1]:
            return match[0] if is_new else ""
        return f"{field.label} ({path})" if is_new else field.label

    return _paths().sub(name, text)


@cache
def _paths() -> re.Pattern[str]:
    """Return the pattern of a path in a text: in parentheses (group 1), or bare (group 2)."""
    path = rf"((?:{'|'.join(sections())})\.[a-z_]+)"
    return re.compile(rf" \({path}\)|(?<![\w.-])(?<!--set ){path}(?!\w|=|\.\w)")


def source_fields() -> dict[str, Field]:
    """Return the fields of one table of ``data.sources``, by key."""
    return fields_of(Source)


def get_setting(settings: Struct, path: str) -> Any:
    """Return the value of a setting, such as ``lora.rank``, in a recipe or another struct."""
    value: Any = settings
    for part in path.split("."):
        value = getattr(value, part)
    return value


def replace_setting(recipe: Recipe, path: str, value: Any) -> Recipe:
    """Return a copy of the recipe with one setting changed.

    The value is not checked; use ``validate`` for that.
    """
    section, _, key = path.rpartition(".")
    if not section:
        return msgspec.structs.replace(recipe, **{key: value})
    inner = msgspec.structs.replace(getattr(recipe, section), **{key: value})
    return msgspec.structs.replace(recipe, **{section: inner})


def replace_settings(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a copy of the recipe with these settings, by path; the values are not checked."""
    for path, value in changes.items():
        recipe = replace_setting(recipe, path, value)
    return recipe


def _metas(hint: Any) -> list[Meta]:
    """Return the declarations in a type hint, from the outer one to the inner ones."""
    if get_origin(hint) is Annotated:
        type_, *metas = get_args(hint)
        return [*metas, *_metas(type_)]
    inner = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    return [meta for each in inner for meta in _metas(each)]


def _field(declared: msgspec.structs.FieldInfo, hint: Any) -> Field:
    metas = _metas(hint)
    meta, type_ = metas[0], get_args(hint)[0]
    bounds = metas[-1]
    low, high = (bounds.gt, bounds.ge), (bounds.lt, bounds.le)
    kind, choices = _kind(type_)
    factory = declared.default_factory
    return Field(
        path=declared.name,
        kind=kind,
        label=meta.title or declared.name,
        help=meta.description or "",
        memory=(meta.extra or {}).get("memory", ""),
        default=declared.default if factory is msgspec.NODEFAULT else factory(),
        type=hint,
        choices=choices,
        minimum=next((bound for bound in low if bound is not None), None),
        maximum=next((bound for bound in high if bound is not None), None),
        exclusive_minimum=bounds.gt is not None,
        exclusive_maximum=bounds.lt is not None,
        min_length=meta.min_length or 0,
        max_length=meta.max_length,
    )


def _kind(type_: Any) -> tuple[Kind, tuple[str, ...]]:
    """Return how a value is edited, and its choices.

    An optional number is edited as a number, and a value that may be a number or a text as a text.
    """
    origin, inner = get_origin(type_), get_args(type_)
    if origin is Annotated:
        return _kind(inner[0])
    if origin in (Union, UnionType):
        return ("text", ()) if str in inner else _kind(inner[0])
    if origin is Literal:
        return "choice", inner
    if origin is tuple:
        return ("texts" if inner[0] is str else "tables"), ()
    if origin is dict:
        return ("names" if inner[1] is str else "numbers"), ()
    kinds: dict[Any, Kind] = {bool: "bool", int: "int", float: "float", str: "text"}
    return kinds[type_], ()


class SettingChange(Struct, frozen=True):
    """A setting that differs between two recipes."""

    path: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}: {self.before} → {self.after}"


def diff_recipes(a: Recipe, b: Recipe) -> list[SettingChange]:
    """Return the settings that change from ``a`` to ``b``, in the order of declaration."""
    pairs = [(path, get_setting(a, path), get_setting(b, path)) for path in fields()]
    return [
        SettingChange(path, format_value(before), format_value(after))
        for path, before, after in pairs
        if before != after
    ]


def format_value(value: Any) -> str:
    """Format a setting's value for display: ``on``, ``1,024``, ``q_proj, k_proj``, ``none``."""
    match value:
        case bool():
            return "on" if value else "off"
        case int() | float():
            return format_number(value)
        case Source():
            return _format_source(value)
        case tuple():
            return ", ".join(map(format_value, value)) or "none"
        case dict():
            return ", ".join(f"{key} = {format_value(part)}" for key, part in value.items()) or "none"
        case _:
            return "none" if value is None else str(value) or "none"


def _format_source(source: Source) -> str:
    notes: list[str] = []
    if source.format != "auto":
        notes.append(source.format)
    if source.columns:
        notes.append(format_value(source.columns))
    if source.weight != 1:
        notes.append(f"weight {format_number(source.weight)}")
    if source.excluded_rows:
        notes.append(f"without rows {source.excluded_rows}")
    return f"{source.path} ({', '.join(notes)})" if notes else source.path
