"""The slow computations of the Memory screen: what fits, what would make it fit, which layers are kept."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.memory import (
    KeptLayers,
    MemorySaving,
    WhatFits,
    cheapest_changes,
    keep_layers,
    largest_settings,
    minimum_bytes,
)
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.recipe.schema import Recipe


@dataclass(frozen=True)
class Solution:
    """What fits in the memory budget; empty until it is computed."""

    fitting: WhatFits | None = None
    changes: tuple[MemorySaving, ...] = ()
    """Changes that make the recipe fit, the cheapest first."""
    least_bytes: int = 0
    """What the recipe still needs with every change; 0 if it fits or some change makes it fit."""
    kept_layers: KeptLayers | None = None
    """The layers that need no recomputation; None if the recipe does not fit."""


def solve(recipe: Recipe, architecture: Architecture, budget: MemoryBudget, *, fits: bool) -> Solution:
    """Compute it, in a thread. ``fits``: whether the recipe fits as it is."""
    device = budget.device
    changes = cheapest_changes(recipe, architecture, budget.bytes, device=device)
    return Solution(
        fitting=largest_settings(recipe, architecture, budget.bytes, device=device),
        changes=changes,
        least_bytes=0 if fits or changes else minimum_bytes(recipe, architecture, device=device),
        kept_layers=keep_layers(recipe, architecture, budget.bytes, device=device) if fits else None,
    )
