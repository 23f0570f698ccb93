"""The steps that this process has traced, which replace the formula wherever the same step is estimated.

They are a part of each :class:`.execution.Device` that :func:`.budget.budget_for` returns, so that no two
places show different figures for one recipe, and what was computed for a device without a trace is out of
date once there is one. :mod:`qlora_tui.runs.exact_memory` traces.
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
"""Traces that are remembered, of some 20 KB each."""
_encode = msgspec.msgpack.Encoder().encode


class KnownTraces:
    """Traced steps; two objects are never equal, as an estimate is cached for one of them."""

    def __init__(self, steps: Mapping[object, StepTrace] = MappingProxyType({})) -> None:
        self._steps = steps

    @staticmethod
    def read_there() -> KnownTraces:
        """Return those of the process that is asked, for a call on another machine."""
        return known_traces()

    def find(
        self, recipe: Recipe, architecture: Architecture, execution: ExecutionConfig
    ) -> StepTrace | None:
        """Return the traced step of a recipe; None if it was not traced."""
        return self._steps.get(_key(recipe, architecture, execution)) if self._steps else None

    def with_step(
        self, recipe: Recipe, architecture: Architecture, execution: ExecutionConfig, traced: StepTrace
    ) -> KnownTraces:
        """Return these and another; itself if it has that one already."""
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
    """Use a traced step in all estimates of it from now on."""
    global _known
    with _lock:
        _known = _known.with_step(recipe, architecture, execution, traced)


def forget() -> None:
    """Use the formula for every step again."""
    global _known
    with _lock:
        _known = NO_TRACES


def traced_settings(recipe: Recipe) -> Recipe:
    """Return a recipe with those settings alone that change the memory of a step's tensors."""
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
    """Return the code that runs without what changes only the process, and not its tensors."""
    return replace(execution, general_prompts=0, multiprocessors=None, cuda_libraries=False)


def _key(recipe: Recipe, architecture: Architecture, execution: ExecutionConfig) -> object:
    return _encode(traced_settings(recipe)), architecture, traced_execution(execution)
