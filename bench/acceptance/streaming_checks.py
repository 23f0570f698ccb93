"""Checks of weights and inputs in host memory: losses equal to those without, and the estimate."""

from __future__ import annotations

from statistics import median
from typing import Any

from bench.acceptance.context import CheckContext, CheckSkipped, Outcome
from bench.acceptance.runs import EndedRun, short_recipe, train
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.memory import estimate, trainer_execution
from qlora_tui.memory.budget import local_budget
from qlora_tui.memory.step_choice import slowdown
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.events import MemoryMeasured, Step

_LOSS_TOLERANCE = 2e-3
"""Allowed relative difference of a loss, because kernels of a GPU sum in any order."""
_MEMORY_TOLERANCE = 0.05
_OVERLAP = 1.15
"""Allowed time of a step, as a multiple of the longer of copying and computing."""


def streaming(context: CheckContext) -> Outcome:
    """Compare a run with streamed layers to a run without: losses, allocated memory, and time of a step."""
    return _beside_resident(context, quantization__streamed_layers=1024)


def offload(context: CheckContext) -> Outcome:
    """Compare a run with layer inputs in host memory to a run with all on the GPU: losses and memory."""
    return _beside_resident(context, training__gradient_checkpointing="offload")


def _beside_resident(context: CheckContext, **changes: Any) -> Outcome:
    if not context.has_gpu:
        raise CheckSkipped("there is no GPU to copy to")
    settings: dict[str, Any] = {"training__gradient_checkpointing": "on", "training__max_steps": 8}
    recipe = short_recipe(context, **(settings | changes))
    # The second run reads the weights that the first one quantized.
    resident = train(short_recipe(context, **settings)).require_finished()
    changed = train(recipe).require_finished()
    pairs = list(zip(resident.losses, changed.losses, strict=True))
    difference = max(abs(a - b) / abs(a) for a, b in pairs)
    allocated = changed.events_of(MemoryMeasured)[-1].allocated_bytes
    figures = _figures(context, recipe, resident, changed)
    expected = figures["estimated_allocated_bytes"]
    passed = difference <= _LOSS_TOLERANCE
    passed = passed and abs(allocated / expected - 1) <= _MEMORY_TOLERANCE
    if figures["predicted"] is not None:
        passed = passed and figures["slowdown"] <= _OVERLAP * figures["predicted"]
    return Outcome.of(
        passed,
        f"{len(pairs)} losses, at most {difference:.1e} apart; {figures['slowdown']:.2f}× as long a step",
        {"difference": difference, "allocated_bytes": allocated, **figures},
    )


def _figures(context: CheckContext, recipe: Recipe, resident: EndedRun, changed: EndedRun) -> dict[str, Any]:
    """Return the estimated memory, and the measured and predicted slowdown."""
    architecture, device = resolve_model(context.model).architecture, local_budget().device
    execution = trainer_execution(recipe, device, architecture)
    speeds = [median([s.tokens_per_s for s in run.events_of(Step)][2:]) for run in (resident, changed)]
    return {
        "estimated_allocated_bytes": estimate(recipe, architecture, device=device).allocated_bytes,
        "slowdown": speeds[0] / speeds[1],
        "predicted": None
        if device.speed is None
        else slowdown(recipe, architecture, execution, device.speed),
    }
