"""Tables that describe a model family, their expansion to modules, and typed reading of ``config.json``.

A size in a table is a name (``hidden``, ``q``) or a sum of products of names and numbers (``q+2*kv``). A
condition (``only``, ``bias``) is the name of a size or flag that must not be 0. ``families/`` holds the
tables. Every error about a config names the field, its value and the expected values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from qlora_tui.catalog.architecture_types import Embedding, LinearModule, Parameter, Part, Role
from qlora_tui.errors import UserError

MAX_SIZE = 1 << 31
"""Far above any size in a real config."""
_MAX_COUNT = {
    **dict.fromkeys(("layer", "layers", "depth", "depths", "blocks"), 1000),
    **dict.fromkeys(("head", "heads", "experts"), 100_000),
}
"""Tighter bounds for sizes that count modules, by the last word of the key."""


def size_bound(key: str) -> int:
    """Return the largest size that a config may have under ``key``."""
    return _MAX_COUNT.get(key.rpartition("_")[2], MAX_SIZE)


def config_problem(where: str, what: str) -> UserError:
    """Build the error for a config that cannot be used."""
    return UserError(
        "The model's config cannot be used",
        what=f"{where}: {what}.",
        why="The model's shape is read from its config.json.",
        fix="Compare the file with the one published with the model, or download the model again.",
    )


class NotInTableError(Exception):
    """A table does not cover this variant of its family."""


class ConfigFields:
    """One JSON object of a config, and its location in the file."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = values
        self.where = where
        """Location for messages: ``config.json``, ``config.json, text_config``."""

    def first(self, keys: tuple[str, ...]) -> tuple[str, object] | None:
        """Return the first of ``keys`` that is present, with its value (which may be None)."""
        for key in keys:
            if key in self.values:
                return key, self.values[key]
        return None

    def invalid(self, key: str, expected: str) -> UserError:
        value_text = repr(self.values.get(key))
        if len(value_text) > 40:
            value_text = value_text[:39] + "…"
        return config_problem(self.where, f"{key} is {value_text}, expected {expected}")

    def missing(self, key: str) -> UserError:
        return config_problem(self.where, f"{key} is missing")

    def size(self, keys: tuple[str, ...], *, minimum: int = 1) -> int | None:
        """Return an integer from ``minimum`` up; None when absent or null. Raises UserError otherwise."""
        entry = self.first(keys)
        if entry is None or entry[1] is None:
            return None
        key, value = entry
        maximum = size_bound(key)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.invalid(key, f"a whole number from {minimum} to {maximum}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.invalid(key, "true or false")
        return value

    def text(self, keys: tuple[str, ...]) -> str | None:
        entry = self.first(keys)
        if entry is None or entry[1] is None:
            return None
        if not isinstance(entry[1], str):
            raise self.invalid(entry[0], "a string")
        return entry[1]

    def number(self, key: str) -> float | None:
        """Return a number above 0 and up to 1e6; None when absent or null. Raises UserError otherwise."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e6:
            raise self.invalid(key, "a number above 0 and up to 1000000")
        return float(value)

    def indices(self, key: str) -> frozenset[int]:
        """Return a list of layer indices as a set; empty when absent or null. Raises UserError otherwise."""
        value = self.values.get(key)
        if value is None:
            return frozenset()
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.invalid(key, "a list of layer numbers")
        return frozenset(value)

    def names(self, key: str, length: int) -> tuple[str, ...] | None:
        """Return a list of ``length`` strings; None when absent or null. Raises UserError otherwise."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.invalid(key, "a list of names")
        if len(value) < length:
            raise config_problem(self.where, f"{key} has {len(value)} entries for {length} layers")
        return tuple(value[:length])

    def child(self, key: str) -> ConfigFields:
        """Return a nested object. Raises UserError when absent or not an object."""
        if self.values.get(key) is None:
            raise self.missing(key)
        value = self.values[key]
        if not isinstance(value, dict):
            raise self.invalid(key, "an object")
        return ConfigFields(value, f"{self.where}, {key}")


_MAX_VALUES = 200_000
"""Most values in a config. The longest real lists name each module that is not quantized."""


def check_bounds(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Raise UserError for a number that no model has, at any depth, before a library allocates by it."""
    places: list[tuple[str, object]] = [("", config)]
    seen = 0
    while places:
        key, value = places.pop()
        seen += 1
        if seen > _MAX_VALUES:
            raise config_problem(where, f"it has more than {_MAX_VALUES:,} values")
        if isinstance(value, dict):
            places += [(str(name), each) for name, each in value.items()]
        elif isinstance(value, list):
            places += [(key, each) for each in value]
        elif type(value) is int and abs(value) > size_bound(key):
            raise ConfigFields({key: value}, where).invalid(key, f"at most {size_bound(key)}")


Sizes = Mapping[str, int]
"""Named sizes and flags (0 or 1) of one model, or of one of its layers."""


@dataclass(frozen=True, slots=True)
class SizeField:
    """An integer of ``config.json``."""

    keys: tuple[str, ...]
    """Its possible keys in the file, the usual one first."""
    default: int | str | None = None
    """The config class's default, a number or an expression; None if the file must have it."""
    null_value: int | str | None = None
    """Meaning of an explicit null, where it differs from ``default``."""
    minimum: int = 1


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """An ``nn.Linear`` (or GPT-2's ``Conv1D``)."""

    name: str
    fan_in: str
    fan_out: str
    part: Part = "other"
    bias: bool | str = False
    condition: str = ""
    conv1d: bool = False
    quantizable: bool = True
    """Whether transformers quantizes it with bitsandbytes; estimate and export read it from here."""


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A normalization layer: one weight, and optionally a bias."""

    name: str
    width: str = "hidden"
    bias: bool = False
    condition: str = ""
    repeat: str = ""
    """Name of the size that counts numbered copies: ``q_layernorm.norms.0`` and so on."""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """Any other parameter, by name."""

    name: str
    shape: tuple[str, ...]
    role: Role
    condition: str = ""


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    """An ``nn.Embedding``."""

    name: str
    rows: str
    width: str


LayerEntry = LinearSpec | NormSpec | ParameterSpec
Adjust = Callable[[ConfigFields, dict[str, int]], None]
PerLayer = Callable[[ConfigFields, Sizes], list[Sizes]]


@dataclass(frozen=True)
class Family:
    """The structure that transformers builds for some ``model_type`` values."""

    model_types: tuple[str, ...]
    layer: tuple[LayerEntry, ...]
    """Entries of each layer; names are relative to the layer."""
    base: str = "model"
    blocks: str = "layers"
    """Path of the layers: ``{base}.{blocks}.0``."""
    embedding_tables: tuple[EmbeddingSpec, ...] = (EmbeddingSpec("embed_tokens", "vocab", "hidden"),)
    top_level: tuple[LayerEntry, ...] = (NormSpec("norm"),)
    """Entries outside the layers; names are relative to ``base``."""
    head: LinearSpec = LinearSpec("lm_head", "hidden", "vocab")
    tied: bool = False
    """Class default of ``tie_word_embeddings``."""
    activation: str = "silu"
    """Class default of the activation."""
    gated: bool = True
    own_attention: bool = False
    """Whether its attention is code of its own, which no kernel replaces."""
    own_norms: bool = False
    """Whether its norms are LayerNorms in code of its own, which no kernel replaces."""
    sizes: Mapping[str, SizeField] = field(default_factory=dict)
    """Sizes in addition to, or instead of, ``COMMON_SIZES``."""
    flags: Mapping[str, bool] = field(default_factory=dict)
    """Booleans of the file, with their class defaults."""
    adjust: Adjust | None = None
    """Function that computes sizes the file does not state."""
    per_layer: PerLayer | None = None
    """Function that returns the sizes and flags of each layer, which are merged over the model's."""


@lru_cache(maxsize=512)
def _terms(expression: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(term.split("*")) for term in expression.split("+"))


def evaluate(expression: str, sizes: Sizes) -> int:
    """Evaluate a size expression such as ``q+2*kv``."""
    total = 0
    for term in _terms(expression):
        product = 1
        for factor in term:
            product *= int(factor) if factor.isdigit() else sizes[factor]
        total += product
    return total


def _is_true(condition: bool | str, sizes: Sizes) -> bool:
    return condition if isinstance(condition, bool) else bool(sizes[condition])


@dataclass
class ExpandedModel:
    """Result of expanding tables."""

    modules: list[LinearModule] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)

    def add(
        self, entries: tuple[LayerEntry, ...], prefix: str, layer: int | None, sizes: Sizes, vision: bool
    ) -> None:
        """Expand ``entries`` under ``prefix``. With ``vision`` all entries count as the vision tower's."""
        for entry in entries:
            if entry.condition and not sizes[entry.condition]:
                continue
            if isinstance(entry, LinearSpec):
                self.modules.append(_linear(entry, prefix, layer, sizes, vision))
            else:
                role: Role = (
                    "vision" if vision else entry.role if isinstance(entry, ParameterSpec) else "norm"
                )
                for name, shape in _parameter_shapes(entry, sizes):
                    self.parameters.append(Parameter(f"{prefix}.{name}", role, layer, shape))


def _linear(entry: LinearSpec, prefix: str, layer: int | None, sizes: Sizes, vision: bool) -> LinearModule:
    return LinearModule(
        name=f"{prefix}.{entry.name}",
        kind=entry.name.rpartition(".")[2],
        part="vision" if vision else entry.part,
        layer=layer,
        in_features=evaluate(entry.fan_in, sizes),
        out_features=evaluate(entry.fan_out, sizes),
        bias=_is_true(entry.bias, sizes),
        quantizable=entry.quantizable,
        conv1d=entry.conv1d,
    )


def _parameter_shapes(entry: NormSpec | ParameterSpec, sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    if isinstance(entry, ParameterSpec):
        yield entry.name, tuple(evaluate(size, sizes) for size in entry.shape)
        return
    shape = (evaluate(entry.width, sizes),)
    names = [f"{entry.name}.{i}" for i in range(sizes[entry.repeat])] if entry.repeat else [entry.name]
    for name in names:
        yield f"{name}.weight", shape
        if entry.bias:
            yield f"{name}.bias", shape


def expand(
    family: Family, base: str, sizes: Sizes, layers: list[Sizes], *, vision: bool = False
) -> ExpandedModel:
    """Return all linear modules and parameters of ``family`` under ``base``. ``layers`` has overrides."""
    expanded = ExpandedModel()
    for index, overrides in enumerate(layers):
        merged = {**sizes, **overrides} if overrides else sizes
        expanded.add(family.layer, f"{base}.{family.blocks}.{index}", index, merged, vision)
    expanded.add(family.top_level, base, None, sizes, vision)
    return expanded


def embeddings(family: Family, base: str, sizes: Sizes) -> tuple[Embedding, ...]:
    return tuple(
        Embedding(f"{base}.{table.name}", evaluate(table.rows, sizes), evaluate(table.width, sizes))
        for table in family.embedding_tables
    )
