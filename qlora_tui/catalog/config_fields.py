"""Typed reading of ``config.json``. An error names the field, and also its value and the expected values if
the value is invalid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_tui.errors import UserError

MAX_SIZE = 1 << 31
"""Maximum value of a size in a config. Sizes in real configs are far smaller."""
_MAX_COUNT = {
    **dict.fromkeys(("layer", "layers", "depth", "depths", "blocks"), 1000),
    **dict.fromkeys(("head", "heads", "experts"), 100_000),
}
"""Smaller maximum values for sizes that count modules, keyed by the last word of the config's key."""


def size_bound(key: str) -> int:
    """Return the maximum size that is allowed under ``key`` in a config."""
    return _MAX_COUNT.get(key.rpartition("_")[2], MAX_SIZE)


MISSING = "missing-field"
"""Error code for a required field that a config lacks."""


def config_problem(where: str, what: str, code: str = "") -> UserError:
    """Build the error for a config that cannot be used."""
    return UserError(
        "The model's config cannot be used",
        what=f"{where}: {what}.",
        why="The model's shape is read from its config.json.",
        fix="Compare the file with the one published with the model, or download the model again.",
        code=code,
    )


def no_text_generator(what: str) -> UserError:
    """Build the error for a model that does not generate text token by token.

    ``what`` names the model and the reason, without a period.
    """
    return UserError(
        "This model does not generate text",
        what=f"{what}.",
        why="Fine-tuning here needs a causal language model, with its output head.",
        fix="Choose a model that continues text, such as Qwen, Llama or Gemma.",
    )


UNNAMED_METHOD = "an unnamed method"
"""Stands for the quantization method if a config has quantization settings but no method name."""


def stored_as(config: Mapping[str, Any]) -> Any:
    """Return the quantization of the weights according to a config or a nested config; None if there is none.

    The result is the name of the method (``awq``), followed by "in one of its parts" if a nested config has
    it. Settings in another form are returned as they are.
    """
    # Nested configs count too: a library loads the weights of a model's parts by the settings of the whole.
    places = [config]
    while places:
        place = places.pop()
        if stored := place.get("quantization_config") or place.get("compression_config"):
            method = _method_of(stored)
            return method if place is config else f"{method} in one of its parts"
        places += [part for part in place.values() if isinstance(part, Mapping)]
    return None


def _method_of(stored: Any) -> Any:
    if not isinstance(stored, Mapping):
        return stored
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        return "bitsandbytes"
    method = stored.get("quant_method")
    return UNNAMED_METHOD if method is None else method


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
        return config_problem(self.where, f"{key} is missing", MISSING)

    def size(self, keys: tuple[str, ...], *, minimum: int = 1) -> int | None:
        """Return an integer of at least ``minimum``; None if absent or null. Raises UserError otherwise."""
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
        """Return a number above 0 and up to 1e6; None if absent or null. Raises UserError otherwise."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e6:
            raise self.invalid(key, "a number above 0 and up to 1000000")
        return float(value)

    def indices(self, key: str) -> frozenset[int]:
        """Return a list of layer indices as a set; empty if absent or null. Raises UserError otherwise."""
        value = self.values.get(key)
        if value is None:
            return frozenset()
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.invalid(key, "a list of layer numbers")
        return frozenset(value)

    def names(self, key: str, length: int) -> tuple[str, ...] | None:
        """Return the first ``length`` strings of a list; None if absent or null. Raises UserError otherwise,
        or if the list is shorter.
        """
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.invalid(key, "a list of names")
        if len(value) < length:
            raise config_problem(self.where, f"{key} has {len(value)} entries for {length} layers")
        return tuple(value[:length])

    def child(self, key: str) -> ConfigFields:
        """Return a nested object. Raises UserError if it is absent or not an object."""
        if self.values.get(key) is None:
            raise self.missing(key)
        value = self.values[key]
        if not isinstance(value, dict):
            raise self.invalid(key, "an object")
        return ConfigFields(value, f"{self.where}, {key}")


_MAX_VALUES = 200_000
"""Maximum number of values in a config. The longest real lists name every module that is not quantized."""


def check_bounds(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Raise UserError for an impossibly large number at any depth, before memory is allocated for it."""
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
