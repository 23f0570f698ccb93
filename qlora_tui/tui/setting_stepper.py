"""Computes the next higher or lower value of a setting, such as the rank or the learning rate, for keys
that step the setting up or down.
"""

from __future__ import annotations

import math
from typing import Any

from qlora_tui.recipe.fields import Field

_POWERS_OF_TWO = frozenset(
    (
        "lora.rank",
        "lora.alpha",
        "data.max_length",
        "training.micro_batch_size",
        "training.gradient_accumulation",
    )
)
"""Settings that step from one power of two to the next."""
_BY_ONE = frozenset(
    (
        *("training.keep_checkpoints", "training.early_stopping", "training.seed", "training.lr_cycles"),
        "training.gpus",
    )
)
_HALVES = frozenset(("training.epochs",))
_DROPOUTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Dropout values: those in the LoRA and QLoRA papers, and a few more."""
_SHARES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9)
_ROUND = (1, 2, 3, 5)
"""Leading digits of the values of numeric settings that have no rule of their own: 1, 2, 3, 5, 10, 20…"""


def step_value(field: Field, value: Any, direction: int) -> Any:
    """Return the setting's next value up (``direction`` 1) or down (-1) within its bounds. Choices wrap
    around at either end, and a Boolean value is toggled in either direction. Return ``value`` itself if a
    number is at its bound, or if the setting is text or a list.
    """
    match field.kind:
        case "bool":
            return not value
        case "choice":
            return field.choices[(field.choices.index(value) + direction) % len(field.choices)]
        case "int":
            return int(_bounded(field, _number(field, float(value), direction), float(value)))
        case "float":
            return _bounded(field, _number(field, value, direction), value)
        case _:
            return value


def _number(field: Field, value: float, direction: int) -> float:
    if field.path in _POWERS_OF_TWO:
        return _power(value, direction)
    if field.path in _BY_ONE:
        return value + direction
    if field.path in _HALVES:
        step = 0.5 if value < 3 or (value == 3 and direction < 0) else 1.0
        return _on_grid(value, step, direction)
    if field.path == "lora.dropout":
        return _neighbor(_DROPOUTS, value, direction)
    if field.kind == "float" and field.minimum == 0 and field.maximum == 1 and field.exclusive_maximum:
        return _neighbor(_SHARES, value, direction)
    return _next_round_number(value, direction, whole=field.kind == "int")


def _power(value: float, direction: int) -> float:
    if direction < 0 and value <= 1:
        return value
    exponent = math.log2(value)
    nearest = round(exponent)
    if math.isclose(exponent, nearest, abs_tol=1e-9):
        return float(2 ** (nearest + direction))
    return float(2 ** (math.ceil(exponent) if direction > 0 else math.floor(exponent)))


def _on_grid(value: float, step: float, direction: int) -> float:
    place = value / step
    return step * (math.floor(place + 1e-9) + 1 if direction > 0 else math.ceil(place - 1e-9) - 1)


def _neighbor(steps: tuple[float, ...], value: float, direction: int) -> float:
    if direction > 0:
        return next((step for step in steps if step > value * (1 + 1e-9)), value)
    return next((step for step in reversed(steps) if step < value * (1 - 1e-9)), value)


def _next_round_number(value: float, direction: int, *, whole: bool) -> float:
    if value <= 0:
        return (1.0 if whole else 0.1) if direction > 0 else value
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    steps = [power * r / 10 for r in _ROUND] + [power * r for r in (*_ROUND, 10)]
    reached = _neighbor(tuple(float(f"{step:.6g}") for step in steps), value, direction)
    if direction < 0 and (reached < 1 if whole else reached < 1e-7):
        return 0.0
    return reached


def _bounded(field: Field, wanted: float, value: float) -> float:
    """Return ``wanted`` if it is within the setting's bounds. If it is beyond a bound, return the bound, or
    ``value`` if the bound itself is not allowed.
    """
    low, high = field.minimum, field.maximum
    if low is not None and (wanted <= low if field.exclusive_minimum else wanted < low):
        return value if field.exclusive_minimum else low
    if high is not None and (wanted >= high if field.exclusive_maximum else wanted > high):
        return value if field.exclusive_maximum else high
    return wanted
