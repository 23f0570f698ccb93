"""Models worth starting with on this machine: those of a short list that fit. Computed in a thread."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.starter_models import STARTER_MODELS
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.screens.models.model_fit import need

_MOST = 5
_MOST_PARAMETERS_ON_CPU = 2_000_000_000
"""Above, a step on a processor takes minutes."""
_BYTES_PER_WEIGHT = 2
"""Of the files on the Hub, which are in 16 bits."""


@dataclass(frozen=True)
class Starter:
    """A model on the Hub, and what it needs with the recipe as it is."""

    id: str
    license: str
    architecture: Architecture
    needs_bytes: int
    verdict: str

    @property
    def download_bytes(self) -> int:
        """Size of its files."""
        return self.architecture.total_params * _BYTES_PER_WEIGHT


def starters(recipe: Recipe, budget: MemoryBudget) -> tuple[Starter, ...]:
    """The largest models that fit, from small to large; the smallest one where none does."""
    all_models = []
    for model in STARTER_MODELS:
        architecture = model.architecture()
        all_models.append(Starter(model.id, model.license, architecture, *need(architecture, recipe, budget)))
    on_cpu = budget.device.kind == "cpu"
    fitting = [
        starter
        for starter in all_models
        if starter.verdict == "fits"
        and not (on_cpu and starter.architecture.total_params > _MOST_PARAMETERS_ON_CPU)
    ]
    return tuple(fitting[-_MOST:] or all_models[:1])
