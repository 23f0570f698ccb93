"""The slow computations of the Memory screen: what fits, what would make it fit, which layers are kept.

And whether the model is converted first: that reads a header of hundreds of thousands of tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.memory import (
    Device,
    MemorySaving,
    StepChoice,
    WhatFits,
    cheapest_changes,
    choose_step,
    estimate,
    largest_settings,
    minimum_bytes,
)
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import PRECISIONS, Precision, precision_of
from qlora_tui.memory.levels import Conversion
from qlora_tui.memory.step_choice import describe_host_memory
from qlora_tui.recipe.fields import fields, get_setting, replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.setting_stepper import step_value

HALVED_SETTINGS = ("data.max_length", "training.micro_batch_size", "lora.rank")
"""Settings that keys of the Memory screen double and halve."""
CYCLED_SETTINGS = ("lora.target_modules", "training.gradient_checkpointing")
"""Settings of which one key selects the next choice."""
METHOD_OF_PRECISION = {"nf4": "nf4", "int8": "int8", "fp16": "none"}
"""Value of ``quantization.method`` for each precision."""
TARGETS: tuple[tuple[str, ...], ...] = (
    ("all-linear",),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "v_proj"),
)
"""The choices of the key ``t``: those of the QLoRA paper, of many recipes, and of the LoRA paper."""


@dataclass(frozen=True)
class KeyEffect:
    """What a key would do: the setting's next value, and the bytes that it adds, mostly fewer than 0."""

    value: Any
    bytes: int


@dataclass(frozen=True)
class Solution:
    """What fits in the memory budget; empty until it is computed."""

    fitting: Mapping[Precision, WhatFits] = field(default_factory=dict)
    """How far each setting could go, by precision."""
    lowered: Mapping[Precision, Mapping[str, KeyEffect]] = field(default_factory=dict)
    """What halving a setting, or its next choice, changes, by its path; without those at their least."""
    changes: tuple[MemorySaving, ...] = ()
    """Changes that make the recipe fit, the cheapest first."""
    least_bytes: int = 0
    """What the recipe still needs with every change; 0 if it fits or some change makes it fit."""
    step: StepChoice | None = None
    """What the run does with free memory; None if the recipe does not fit."""
    host_memory: str = ""
    """What the recipe keeps in host memory and its cost, in sentences; empty where it keeps nothing."""
    conversion: Conversion | None = None
    """The conversion that a GGUF file needs before its first run."""


def solve(recipe: Recipe, architecture: Architecture, budget: MemoryBudget, *, fits: bool) -> Solution:
    """Compute it, in a thread. ``fits``: whether the recipe fits as it is."""
    device, available = budget.device, budget.bytes
    changes = cheapest_changes(recipe, architecture, available, device=device)
    return Solution(
        fitting={
            precision: largest_settings(
                _in_precision(recipe, precision), architecture, available, device=device
            )
            for precision in PRECISIONS
        },
        lowered={
            precision: _lowered(_in_precision(recipe, precision), architecture, device)
            for precision in PRECISIONS
        },
        changes=changes,
        least_bytes=0 if fits or changes else minimum_bytes(recipe, architecture, device=device),
        step=choose_step(recipe, architecture, available, device=device) if fits else None,
        host_memory=describe_host_memory(recipe, architecture, device),
        conversion=_conversion(recipe.model.id),
    )


def next_targets(now: tuple[str, ...], kinds: Collection[str]) -> tuple[str, ...]:
    """Return the next choice that a model with these kinds has; all-linear after a custom one."""
    choices = [choice for choice in TARGETS if choice == TARGETS[0] or set(choice) <= set(kinds)]
    index = choices.index(now) + 1 if now in choices else 0
    return choices[index % len(choices)]


def _lowered(recipe: Recipe, architecture: Architecture, device: Device) -> dict[str, KeyEffect]:
    """What each setting's key for less would change, or its only key."""
    now = estimate(recipe, architecture, device=device).total_bytes
    changes = {}
    for path in (*HALVED_SETTINGS, *CYCLED_SETTINGS):
        value = get_setting(recipe, path)
        if path == "lora.target_modules":
            lower = next_targets(value, architecture.kinds())
        else:
            lower = step_value(fields()[path], value, -1 if path in HALVED_SETTINGS else 1)
        if lower != value:
            total = estimate(replace_setting(recipe, path, lower), architecture, device=device).total_bytes
            changes[path] = KeyEffect(lower, total - now)
    return changes


def _conversion(model_id: str) -> Conversion | None:
    if not model_id.endswith(".gguf"):
        return None
    from qlora_tui.training.gguf_conversion import pending_conversion  # loads tokenizers

    return pending_conversion(model_id)


def _in_precision(recipe: Recipe, precision: Precision) -> Recipe:
    """The recipe, trained in another precision."""
    if precision == precision_of(recipe):
        return recipe
    return replace_setting(recipe, "quantization.method", METHOD_OF_PRECISION[precision])
