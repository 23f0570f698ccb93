"""How long a run will take, known before its launch by the speed of earlier runs on the same device.

Speeds are real tokens per second. One that was measured with another model or other settings is converted by
the predicted times of a step (:func:`qlora_tui.memory.step_choice.step_seconds`). Loading, evaluations and
checkpoints are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from statistics import median

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.local_models import load_architecture
from qlora_tui.errors import UserError
from qlora_tui.memory.execution import Device
from qlora_tui.memory.step_choice import step_seconds
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.view import RunView

_RUNS = 20
"""Earlier runs that are looked at, the newest first."""
_STEPS = 64
_LEAST_STEPS = 3
"""Of a run whose speed counts. The first step is left out: it compiles, and memory grows."""


@dataclass(frozen=True)
class ExpectedTime:
    """Training time of a run that was not launched yet."""

    seconds: float
    run: str
    """Name of the run whose speed it follows; empty if it was calculated for the device."""
    is_same_model: bool = True
    """Whether that run trained the same model."""


def expected_time(
    recipe: Recipe, architecture: Architecture, device: Device, device_name: str, tokens: float
) -> ExpectedTime | None:
    """Return the time that training on ``tokens`` real tokens takes; None if nothing says it.

    Args:
        device_name: name in the events of earlier runs; empty for a device that is not in this machine.
        tokens: of all epochs.
    """
    cost = _seconds_per_token(recipe, architecture, device)
    measured = list(_measured(device, device_name)) if device_name else []
    if measured:
        like = min(measured, key=lambda one: abs(math.log(one.cost / cost)))
        seconds = tokens / like.tokens_per_s * cost / like.cost
        return ExpectedTime(seconds, like.run.name, like.model == recipe.model.id)
    return None if device.kind == "cpu" else ExpectedTime(tokens * cost, "", is_same_model=False)


@dataclass(frozen=True)
class _Measured:
    run: RunDir
    model: str
    tokens_per_s: float
    cost: float
    """Predicted seconds for each token."""


def _measured(device: Device, name: str) -> Iterator[_Measured]:
    """Yield the speed of earlier runs on the device of this name."""
    for run in islice(all_runs(), _RUNS):
        with suppress(UserError, OSError):
            view, _ = RunView.from_sample(run, _STEPS)
            recipe = run.readable_recipe()
            speeds = [speed for speed in view.series.tokens_per_s[1:] if speed > 0]
            if recipe is None or len(speeds) < _LEAST_STEPS - 1:
                continue
            if view.environment is None or view.environment.device != name:
                continue
            cost = _seconds_per_token(recipe, load_architecture(recipe.model.id), device)
            yield _Measured(run, recipe.model.id, median(speeds), cost)


def _seconds_per_token(recipe: Recipe, architecture: Architecture, device: Device) -> float:
    tokens = recipe.effective_batch * recipe.data.max_length
    return step_seconds(recipe, architecture, device) / tokens
