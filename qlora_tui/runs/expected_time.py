"""Expected length of a run that has not started: the number of its steps, and the time that they take.

Speeds are tokens per second, without padding, of earlier runs on the same device. A speed that was measured
with another model or other settings is scaled by the ratio of the predicted step times
(:func:`qlora_tui.memory.step_choice.step_seconds`). Loading, evaluations and checkpoints are not included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from statistics import median
from typing import Literal, TypeAlias

from qlora_tui.catalog.adapters import adapter_parameters
from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.local_models import ModelFiles, ModelNotFoundError, find_files, load_architecture
from qlora_tui.data.counted import counted_key, find_counted
from qlora_tui.data.sources import every_source, source_stamps
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_duration, pluralize, short_model_name
from qlora_tui.memory.execution import Device
from qlora_tui.memory.step_choice import step_seconds
from qlora_tui.memory.traces import NO_TRACES
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.targets import resolve_targets
from qlora_tui.remote.calls import at_box
from qlora_tui.runs.data_checks import RunLength, run_length
from qlora_tui.runs.devices import devices_of
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.doctor import Machine
from qlora_tui.runs.step_probe import StepProbe
from qlora_tui.runs.view import RunView
from qlora_tui.worker import Progress, run_job

_RUNS = 20
"""Number of earlier runs that are read, newest first."""
_STEPS = 64
_MOST_COUNTED_BYTES = 256 << 20
"""Maximum size of the data, in bytes, for counting its samples ahead of a run. Counting more data would take
over a minute of CPU time.
"""
LEAST_STEPS = 3
"""Minimum number of steps of a run whose speed is used. The first step is excluded, because it compiles and
allocates.
"""
TimeBasis: TypeAlias = Literal["probe", "run", "another model", "measured speed", "typical card"]
"""Source of an expected time: measured steps of this recipe, an earlier run, a run of another model, the
speed that ``doctor`` measured, or none of these."""


@dataclass(frozen=True)
class ExpectedTime:
    """Expected training time of a run that has not started."""

    seconds: float
    basis: TimeBasis
    run: str = ""
    """Name of the run whose speed was used."""
    probe: str = ""
    """What was measured, in a clause, if steps of this recipe were measured."""

    @property
    def source(self) -> str:
        """Source of the expected time, in a clause: ``judging by vicuna-1``."""
        match self.basis:
            case "probe":
                return self.probe
            case "run":
                return f"judging by {self.run}"
            case "another model":
                return f"judging by {self.run}, which trains another model"
            case "measured speed":
                return "calculated from this card's measured speed"
            case "typical card":
                return "calculated for a typical card, since nothing has been trained here yet"


@dataclass(frozen=True)
class Forecast:
    """Expected length of a run that has not started."""

    length: RunLength
    time: ExpectedTime | None
    """Expected time; None if nothing was trained on this CPU yet."""

    @property
    def duration(self) -> str:
        """Expected time to display, such as ``about 25 min``; empty if unknown."""
        return f"{self._least}about {format_duration(self.time.seconds)}" if self.time else ""

    @property
    def steps(self) -> str:
        """Number of steps to display, such as ``54 steps`` or ``at least about 54 steps``."""
        return f"{self._least}{self.length.about}{pluralize(self.length.steps, 'step')}"

    @property
    def _least(self) -> str:
        return "" if self.length.is_complete else "at least "


@at_box
def forecast(recipe: Recipe, machine: Machine, model: ModelFiles | None = None) -> Forecast | None:
    """Return the expected length of a run; None for data or a model that cannot be read here.

    Takes up to two seconds for data that was not read before. ``model`` has the recipe's model files, if the
    caller has them.
    """
    with suppress(UserError):
        architecture = model.architecture if model else load_architecture(recipe.model.id)
        with suppress(UserError):
            model = model or find_files(recipe.model.id)
        length = run_length(recipe, model)
        if length is not None:
            return Forecast(length, expected_time(recipe, architecture, machine, length.tokens))
    return None


def measured_forecast(expected: Forecast, probe: StepProbe) -> Forecast:
    """Return ``expected`` with its time calculated from the steps that ``probe`` measured."""
    seconds = expected.length.tokens * probe.seconds / max(1, probe.tokens)
    return replace(expected, time=ExpectedTime(seconds, "probe", probe=probe.words))


@at_box
def count_data(
    recipe: Recipe,
    on_progress: Callable[[Progress], object] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Count the samples of a recipe in a child process.

    Does nothing if they have already been counted, if a file is missing, or if the data is too large. Returns
    whether this call counted them.

    Raises:
        JobStopped: ``should_stop`` returned true.
        UserError: The model has no tokenizer here, or the data cannot be used.
    """
    model = find_files(recipe.model.id)
    if counted_key(recipe, model) is None or find_counted(recipe, model) is not None:
        return False
    stamps = chain.from_iterable(source_stamps(source) for source in every_source(recipe.data))
    if sum(size for _, _, size in stamps) > _MOST_COUNTED_BYTES:
        return False
    run_job(
        "qlora_tui.engine.data_service:count_data",
        recipe,
        result=bool,
        title="The samples cannot be counted",
        subject="The process that counts the samples",
        on_progress=on_progress,
        should_stop=should_stop,
    )
    return True


def expected_time(
    recipe: Recipe, architecture: Architecture, machine: Machine, tokens: float
) -> ExpectedTime | None:
    """Return the expected time to train on ``tokens`` tokens, counted over all epochs and without padding.

    Returns None on a CPU on which nothing was trained yet.
    """
    # Traces do not change times, but each new trace would invalidate the cached runs.
    device = replace(machine.budget.device, traces=NO_TRACES)
    return time_on(recipe, architecture, device, machine.device_name, tokens)


def time_on(
    recipe: Recipe, architecture: Architecture, device: Device, device_name: str, tokens: float
) -> ExpectedTime | None:
    """Return the expected time to train on ``tokens`` tokens (without padding) on a device.

    ``device_name`` is the device's name in the events of runs; empty if no run can have trained on it.
    """
    cost = _seconds_per_token(recipe, architecture, device)
    own = short_model_name(recipe.model.id)
    measured = list(_measured_runs(device, device_name, own, architecture)) if device_name else []
    if measured:
        like = min(measured, key=lambda one: abs(math.log(one.cost / cost)))
        seconds = tokens / like.tokens_per_s * cost / like.cost
        return ExpectedTime(seconds, "run" if like.is_own else "another model", like.name)
    if device.kind == "cpu":
        return None
    return ExpectedTime(tokens * cost, "measured speed" if device.speed else "typical card")


@dataclass(frozen=True)
class _Measured:
    """Measured speed of an earlier run."""

    name: str
    is_own: bool
    """Whether its model is the model of the forecast, by name and architecture."""
    tokens_per_s: float
    cost: float
    """Predicted seconds per token."""


def _measured_runs(
    device: Device, device_name: str, own: str, architecture: Architecture
) -> Iterator[_Measured]:
    """Yield the measured speeds of the latest runs that trained on the device ``device_name``. Runs that
    cannot be read are skipped. :func:`_measured` describes the arguments.
    """
    for run in islice(all_runs(), _RUNS):
        with suppress(UserError, OSError):
            measured = _measured(
                run, run.events_path.stat().st_mtime_ns, device, device_name, own, architecture
            )
            if measured is not None:
                yield measured


@lru_cache(maxsize=4 * _RUNS)
def _measured(
    run: RunDir, _changed: int, device: Device, device_name: str, own: str, architecture: Architecture
) -> _Measured | None:
    """Return the speed of a run; None if the run trained on another device or has recorded too few steps, or
    if its recipe or its model cannot be read.

    If the run's model was moved or deleted, but has the same name as the model of the forecast, and as many
    weights were trained as this model would have, it is assumed to be the same model.

    Args:
        run: The run.
        device: The device of the forecast.
        device_name: Name of the device on which the run must have trained.
        own: Short name of the model of the forecast.
        architecture: Architecture of this model.

    Raises UserError, OSError.
    """
    view, _ = RunView.from_sample(run, _STEPS)
    if view.environment is None or view.environment.device != device_name:
        return None
    recipe, devices = run.readable_recipe(), devices_of(run)
    if recipe is not None and devices is not None:
        recipe = replace_setting(recipe, "training.gpus", devices.processes)
    speeds = [speed for speed in view.series.tokens_per_s[1:] if speed > 0]
    if recipe is None or len(speeds) < LEAST_STEPS - 1:
        return None
    has_own_name = short_model_name(recipe.model.id) == own
    try:
        trained = load_architecture(recipe.model.id)
    except ModelNotFoundError:
        if not has_own_name:
            return None
        targets = resolve_targets(recipe.lora, architecture.targets)
        if view.adapter and view.adapter.trained_parameters != adapter_parameters(targets, recipe.lora):
            return None
        trained = architecture
    is_own = has_own_name and trained == architecture
    return _Measured(run.name, is_own, median(speeds), _seconds_per_token(recipe, trained, device))


def _seconds_per_token(recipe: Recipe, architecture: Architecture, device: Device) -> float:
    tokens = recipe.effective_batch * recipe.data.max_length
    return step_seconds(recipe, architecture, device) / tokens
