"""The varied settings of a sweep: values or ranges of recipe fields, and points on a grid or at random.

A value is a field's TOML value. A sweep compares validation losses, so fields that change the validation
rows, their tokens or the computation of the loss are rejected.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Annotated, Any, TypeAlias

import msgspec
import tomli_w
from msgspec import Meta, Struct

from qlora_tui.errors import UsageError
from qlora_tui.recipe import aliases
from qlora_tui.recipe.conflicts import check_conflicts
from qlora_tui.recipe.fields import WITHOUT_EFFECT_ON_WEIGHTS, Field, fields
from qlora_tui.recipe.layering import merge_layers, parse_override
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import parse, to_layer, to_recipe
from qlora_tui.recipe.validation import InvalidRecipeError, find_issues

Point: TypeAlias = dict[str, Any]
"""The value of each varied field, by its path, as in TOML."""
_MOST_POINTS = 4096
_LENGTH = "it changes the length of a run, and trials are compared after the same number of tokens"
_MEASURE = "it changes what the validation loss measures, so the losses of trials could not be compared"
_REASONS: dict[str, str] = {
    "training.epochs": _LENGTH,
    "training.max_steps": _LENGTH,
    "training.replay_share": _LENGTH,
    "training.forgetting_weight": _MEASURE,
    "training.preference_beta": _MEASURE,
    "training.simpo_gamma": _MEASURE,
    "training.seed": "a sweep uses seeds to measure the noise; sweep.seeds sets their number",
    "training.report_to": "it does not affect the trained weights",
    "training.lr_scheduler": "",
    "data.packing": "",
}
"""Why a field is rejected. An empty reason allows a field in a section that is otherwise rejected."""
_SECTIONS = {"data": _MEASURE, "model": _MEASURE}


class Range(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Numbers from ``low`` to ``high``, including both. Integers if the field takes integers."""

    low: float
    high: float
    log: bool = False
    """Whether the range is logarithmic, as is usual for learning rates."""
    points: Annotated[int, Meta(ge=2, le=1000)] = 5
    """Number of evenly spaced values in a grid."""

    def at(self, share: float, *, whole: bool) -> float | int:
        """Return the number at ``share`` of the range: 0 is its low end, and 1 its high end."""
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        value = min(max(value, self.low), self.high)
        # Four significant digits are enough for a setting, and readable.
        return round(value) if whole else float(f"{value:.4g}")

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{' (log)' if self.log else ''}"


Values: TypeAlias = Range | list[Any]
"""A range, or a list of values."""
Space: TypeAlias = dict[str, Values]
"""The values or range of each varied field, by the field's path."""


def parse_vary(argument: str) -> tuple[str, Values]:
    """Parse ``FIELD=VALUES`` from a command line.

    ``VALUES`` is a range (``1e-5..1e-3``, ``1e-5..1e-3:log``), values separated by commas (``8,16,32``), or
    TOML: a list of values or a table with ``low`` and ``high``. Raises UserError, exit code 2.
    """
    path, equals, raw = (part.strip() for part in argument.partition("="))
    if not equals or not raw:
        raise UsageError(
            "Invalid --vary",
            what=f"{argument!r} names no values.",
            fix="Write --vary FIELD=8,16,32 or --vary FIELD=1e-5..1e-3:log.",
        )
    if raw[0] in "[{":
        return path, _converted(path, parse(f"value = {raw}", f"--vary {path}")["value"])
    ends, _, scale = raw.partition(":")
    low, dots, high = ends.partition("..")
    if dots:
        try:
            limits = {"low": float(low), "high": float(high)}
        except ValueError:
            limits = {}
        if not limits or scale not in ("", "log"):
            raise UsageError(
                "Invalid --vary",
                what=f"{raw!r} is not a range.",
                fix="Write LOW..HIGH or LOW..HIGH:log, as in 1e-5..1e-3:log.",
            )
        return path, Range(low=limits["low"], high=limits["high"], log=scale == "log")
    return path, [_value(path, each.strip()) for each in raw.split(",")]


def _value(path: str, raw: str) -> Any:
    value: Any = parse_override(f"{path}={raw}")
    for part in path.split("."):
        value = value[part]
    return value


def _converted(path: str, values: Any) -> Values:
    try:
        return msgspec.convert(values, Range | list[Any], strict=True)
    except msgspec.ValidationError as error:
        raise UsageError(
            "Invalid values to vary",
            what=f"{path}: {error}.",
            fix="Write a list of values, or { low = 1e-5, high = 1e-3, log = true }.",
        ) from None


def check_space(space: Space, recipe: Recipe) -> None:
    """Check that every field can be varied and that every value is valid, both alone and with the recipe.

    Raises UserError, exit code 2.
    """
    if not space:
        raise UsageError(
            "Nothing to vary",
            what="The sweep varies no setting.",
            fix="Pass --vary training.learning_rate=1e-5..1e-3:log, or add a table [sweep.vary].",
        )
    for path, values in space.items():
        field = _field(path)
        _check_variable(field, recipe)
        if isinstance(values, Range):
            _check_range(field, values)
        elif not values or len({repr(value) for value in values}) < len(values):
            raise _invalid(path, "its list of values is empty" if not values else "a value occurs twice")
        for value in extremes(path, values):
            section, _, key = path.rpartition(".")
            issues = find_issues({section: {key: value}} if section else {key: value}, "sweep.vary")
            if issues:
                raise InvalidRecipeError(issues)
            check_conflicts(apply_point(recipe, {path: value}))


def _field(path: str) -> Field:
    field = fields().get(path)
    if field is None:
        hint = aliases.did_you_mean(path, fields())
        raise UsageError(
            "Unknown setting to vary",
            what=f"{path} is not a setting.",
            fix=f"Did you mean {hint.removeprefix('did you mean ')}"
            if hint
            else "See docs/reference/recipe.md.",
        )
    return field


def _check_variable(field: Field, recipe: Recipe) -> None:
    reason = _REASONS.get(field.path)
    if reason is None:
        reason = _SECTIONS.get(field.path.partition(".")[0], "")
        if field.path in WITHOUT_EFFECT_ON_WEIGHTS:
            reason = "it does not affect the trained weights"
    if field.path == "data.packing" and recipe.training.max_steps:
        reason = f"with training.max_steps, {_LENGTH}"
    if reason:
        raise UsageError(
            "A sweep cannot vary this setting",
            what=f"{field.path} cannot be varied: {reason}.",
            fix="Vary another setting; docs/sweeps.md says which can be varied.",
        )


def _check_range(field: Field, values: Range) -> None:
    if field.kind not in ("int", "float"):
        raise _invalid(field.path, f"a range is not possible, because the value is {field.expected}")
    if not (math.isfinite(values.low) and math.isfinite(values.high) and values.low < values.high):
        raise _invalid(field.path, "the low end of the range must be below its high end")
    if values.log and values.low <= 0:
        raise _invalid(field.path, "a logarithmic range must begin above 0")


def _invalid(path: str, what: str) -> UsageError:
    return UsageError(
        "Invalid values to vary", what=f"{path}: {what}.", fix="Correct [sweep.vary] or --vary."
    )


def extremes(path: str, values: Values) -> list[Any]:
    """Return the values of a list, or both ends of a range."""
    if isinstance(values, Range):
        return [values.at(share, whole=is_whole(path)) for share in (0.0, 1.0)]
    return values


def apply_point(recipe: Recipe, point: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the values of a point.

    With ``training.max_steps``, the number of steps is adjusted to the batch size, so that the number of
    trained rows stays the same. Raises UserError.
    """
    layer: Mapping[str, Any] = to_layer(recipe)
    for path, value in point.items():
        section, _, key = path.rpartition(".")
        layer = merge_layers(layer, {section: {key: value}} if section else {key: value})
    changed = to_recipe(layer, "sweep")
    if recipe.training.max_steps and changed.effective_batch != recipe.effective_batch:
        steps = max(1, round(recipe.training.max_steps * recipe.effective_batch / changed.effective_batch))
        training = msgspec.structs.replace(changed.training, max_steps=steps)
        changed = msgspec.structs.replace(changed, training=training)
    return changed


def grid_size(space: Space) -> int:
    """Return the number of points of the grid."""
    return math.prod(len(_grid_values(path, values)) for path, values in space.items())


def grid_points(space: Space) -> Iterator[Point]:
    """Yield every combination of values. Raises UserError for more than 4,096."""
    if grid_size(space) > _MOST_POINTS:
        raise UsageError(
            "The grid is too large",
            what=f"The grid has {grid_size(space):,} points, more than {_MOST_POINTS:,}.",
            fix='Vary fewer values, or draw random points: method = "random".',
        )
    columns = [_grid_values(path, values) for path, values in space.items()]
    for combination in product(*columns):
        yield dict(zip(space, combination, strict=True))


def _grid_values(path: str, values: Values) -> Sequence[Any]:
    if not isinstance(values, Range):
        return values
    whole = _field(path).kind == "int"
    shares = (number / (values.points - 1) for number in range(values.points))
    return list(dict.fromkeys(values.at(share, whole=whole) for share in shares))


def random_point(space: Space, seed: int, number: int) -> Point:
    """Return a random point, which depends only on ``seed`` and ``number``."""
    draw = random.Random(f"{seed}/{number}")
    return {
        path: values.at(draw.random(), whole=_field(path).kind == "int")
        if isinstance(values, Range)
        else draw.choice(values)
        for path, values in space.items()
    }


def is_whole(path: str) -> bool:
    """Return whether a field takes integers."""
    return _field(path).kind == "int"


def value_text(value: Any) -> str:
    """Format a value as TOML on one line, such as ``0.0003`` or ``["q_proj"]``; strings lack quotes."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip().replace("\n", " ")
