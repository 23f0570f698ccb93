"""The slow computations of the Memory screen: what fits, what would make it fit, which layers are kept.

And whether the model is converted first: that reads a header of hundreds of thousands of tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.memory import (
    Device,
    KeptLayersPlan,
    MemorySaving,
    WhatFits,
    cheapest_changes,
    estimate,
    largest_settings,
    minimum_bytes,
    plan_kept_layers,
)
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.conversion import Conversion
from qlora_tui.memory.estimate import PRECISIONS, Precision, precision_of
from qlora_tui.memory.streaming_cost import describe_host_memory
from qlora_tui.recipe.fields import fields, get_setting, replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.setting_stepper import step_value

HALVED_SETTINGS = ("data.max_length", "training.micro_batch_size", "lora.rank")
"""Settings that keys of the Memory screen double and halve."""
METHOD_OF_PRECISION = {"nf4": "nf4", "int8": "int8", "fp16": "none"}
"""Value of ``quantization.method`` for each precision."""
TARGETS: tuple[tuple[str, ...], ...] = (
    ("all-linear",),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "v_proj"),
)
"""The choices of the key ``t``: those of the QLoRA paper, of many recipes, and of the LoRA paper."""


@dataclass(frozen=True)
class Solution:
    """What fits in the memory budget; empty until it is computed."""

    fitting: Mapping[Precision, WhatFits] = field(default_factory=dict)
    """How far each setting could go, by precision."""
    halved: Mapping[Precision, Mapping[str, int]] = field(default_factory=dict)
    """What halving each setting changes, in bytes by its path, by precision; without those at their least."""
    changes: tuple[MemorySaving, ...] = ()
    """Changes that make the recipe fit, the cheapest first."""
    least_bytes: int = 0
    """What the recipe still needs with every change; 0 if it fits or some change makes it fit."""
    kept_layers: KeptLayersPlan | None = None
    """The layers that need no recomputation; None if the recipe does not fit."""
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
        halved={
            precision: _halved(_in_precision(recipe, precision), architecture, device)
            for precision in PRECISIONS
        },
        changes=changes,
        least_bytes=0 if fits or changes else minimum_bytes(recipe, architecture, device=device),
        kept_layers=plan_kept_layers(recipe, architecture, available, device=device) if fits else None,
        host_memory=describe_host_memory(recipe, architecture, device),
        conversion=_conversion(recipe.model.id),
    )


def next_targets(now: tuple[str, ...], kinds: Collection[str]) -> tuple[str, ...]:
    """Return the next choice that a model with these kinds has; all-linear after a custom one."""
    choices = [choice for choice in TARGETS if choice == TARGETS[0] or set(choice) <= set(kinds)]
    index = choices.index(now) + 1 if now in choices else 0
    return choices[index % len(choices)]


def _halved(recipe: Recipe, architecture: Architecture, device: Device) -> dict[str, int]:
    """Bytes that each setting's key for less would add, mostly fewer than 0."""
    now = estimate(recipe, architecture, device=device).total_bytes
    changed = {}
    for path in HALVED_SETTINGS:
        value = get_setting(recipe, path)
        half = step_value(fields()[path], value, -1)
        if half != value:
            smaller = replace_setting(recipe, path, half)
            changed[path] = estimate(smaller, architecture, device=device).total_bytes - now
    return changed


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
