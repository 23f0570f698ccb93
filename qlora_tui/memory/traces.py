"""The steps that this process has traced, which replace the formula in every estimate of the same step.

They are a part of each :class:`.execution.Device` that :func:`.budget.budget_for` returns. So all screens
show the same figures for a recipe, and results computed for a device without a trace are invalid once there
is a trace. :mod:`qlora_tui.runs.exact_memory` makes the traces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec
from msgspec import structs

from qlora_tui.recipe.schema import Recipe

if TYPE_CHECKING:
    from qlora_tui.catalog.architecture_types import Architecture
    from qlora_tui.memory.execution import ExecutionConfig
    from qlora_tui.memory.recording import StepTrace

_MAX = 64
"""Number of traces that are kept, of about 20 KB each."""
_encode = msgspec.msgpack.Encoder().encode


class KnownTraces:
    """Traced steps. Two objects are never equal, because estimates are cached for each object."""

    def __init__(self, steps: Mapping[object, StepTrace] = MappingProxyType({})) -> None:
        self._steps = steps

    @staticmethod
    def read_there() -> KnownTraces:
        """Return the traces of this process.

        Traces are not sent to another machine: a process that receives a message uses its own traces.
        """
        return known_traces()

    def find(
        self, recipe: Recipe, architecture: Architecture, execution: ExecutionConfig
    ) -> StepTrace | None:
        """Return the traced step of a recipe; None if it was not traced."""
        return self._steps.get(_key(recipe, architecture, execution)) if self._steps else None

    def with_step(
        self, recipe: Recipe, architecture: Architecture, execution: ExecutionConfig, traced: StepTrace
    ) -> KnownTraces:
        """Return these traces and another one as a new object; this object if it has that trace already."""
        key = _key(recipe, architecture, execution)
        if self._steps.get(key) == traced:
            return self
        newest = list(self._steps.items())[-_MAX + 1 :]
        return KnownTraces({**dict(newest), key: traced})


NO_TRACES = KnownTraces()
_known = NO_TRACES
_lock = Lock()


def known_traces() -> KnownTraces:
    """Return the steps that this process has traced."""
    return _known


def remember(
    recipe: Recipe, architecture: Architecture, execution: ExecutionConfig, traced: StepTrace
) -> None:
    """Use a traced step in all later estimates of the same step."""
    global _known
    with _lock:
        _known = _known.with_step(recipe, architecture, execution, traced)


def forget() -> None:
    """Discard all traces, so that estimates use the formula again."""
    global _known
    with _lock:
        _known = NO_TRACES


def traced_settings(recipe: Recipe) -> Recipe:
    """Return a recipe with only the settings that change the memory of a step's tensors."""
    plain, data, training, lora = Recipe(), recipe.data, recipe.training, recipe.lora
    return Recipe(
        model=structs.replace(plain.model, attention=recipe.model.attention, kernels=recipe.model.kernels),
        quantization=recipe.quantization,
        lora=structs.replace(
            lora, alpha=plain.lora.alpha, alpha_pattern={}, init_from="adapter" if lora.init_from else ""
        ),
        data=structs.replace(
            plain.data, max_length=data.max_length, packing=data.packing, preferences=data.preferences
        ),
        training=structs.replace(
            plain.training,
            micro_batch_size=training.micro_batch_size,
            gradient_accumulation=min(training.gradient_accumulation, 2),
            gradient_checkpointing=training.gradient_checkpointing,
            optimizer=training.optimizer,
        ),
    )


def traced_execution(execution: ExecutionConfig) -> ExecutionConfig:
    """Return the execution without the fields that do not change the tensors of a step."""
    return replace(execution, general_prompts=0, multiprocessors=None, cuda_libraries=False)


def _key(recipe: Recipe, architecture: Architecture, execution: ExecutionConfig) -> object:
    return _encode(traced_settings(recipe)), architecture, traced_execution(execution)
