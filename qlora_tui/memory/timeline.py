"""Memory of the process over time: the model is loaded, then one training step runs.

The estimate is the maximum of this series. The parts of a step follow one another as they are replayed; how
long each takes is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.memory.estimate import LOADING, Estimate, loading_bytes
from qlora_tui.memory.layout import build_layout
from qlora_tui.memory.moments import step_moments
from qlora_tui.memory.parameter_memory import gradient_bytes
from qlora_tui.memory.static_memory import FROZEN, static_items
from qlora_tui.memory.step import profile_step
from qlora_tui.memory.step_trace import StepTrace
from qlora_tui.recipe.schema import Recipe

Phase = Literal["loading", "forward", "loss", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("loading", "forward", "loss", "backward", "optimizer")
OVERHEAD = "overhead"
"""Item of a moment for all that is not in tensors: context, libraries, and the allocator's slack."""
LOADING_PARTS = 8
"""Moments that loading is divided into."""


@dataclass(frozen=True)
class Moment:
    """Memory of the process at one time."""

    phase: Phase
    name: str
    """``backward of layer 31``, as in :attr:`.step.Peak.phase`."""
    items: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.items.values())


def step_timeline(
    recipe: Recipe, architecture: Architecture, estimated: Estimate, traced: StepTrace | None = None
) -> tuple[Moment, ...]:
    """Return the moments of loading and of a step, in order of time.

    Args:
        recipe: The recipe, in the precision of the estimate.
        architecture: Its model.
        estimated: Its estimate; the largest moment is its peak.
        traced: A trace of this exact recipe, if the estimate was made with one.
    """
    execution = estimated.execution
    layout = build_layout(recipe, architecture, execution)
    resident = static_items(recipe, architecture, layout, execution)
    frozen = {key: size for key, size in resident.items() if key in FROZEN}
    if traced is None and execution.accumulates:
        resident["gradients"] = gradient_bytes(layout, execution)
    profile = profile_step(layout, execution, recipe.lora.dropout)
    peaks = step_moments(profile, layout, execution, traced, every_layer=True)
    most = max(peak.total_bytes for peak in peaks) + sum(resident.values())
    outside = {OVERHEAD: estimated.step_bytes - most}
    moments = _loading(frozen, loading_bytes(recipe, architecture, execution), estimated)
    moments += [
        Moment(_phase_of(peak.phase), peak.phase, _sum(resident, peak.items, outside)) for peak in peaks
    ]
    moments.append(Moment("optimizer", "after the step", _sum(resident, outside)))
    return tuple(moments)


def _loading(frozen: dict[str, int], read_bytes: int, estimated: Estimate) -> list[Moment]:
    """Return the loading of the weights, which is fullest when the last ones are read."""
    read = {"loading": read_bytes}
    outside = {OVERHEAD: estimated.loading_process_bytes - sum(frozen.values()) - read_bytes}
    parts = []
    for part in range(1, LOADING_PARTS + 1):
        loaded = {key: size * part // LOADING_PARTS for key, size in frozen.items()}
        parts.append(Moment("loading", LOADING, _sum(loaded, read, outside)))
    return parts


def _sum(*parts: Mapping[str, int]) -> dict[str, int]:
    items: dict[str, int] = {}
    for part in parts:
        for key, size in part.items():
            items[key] = items.get(key, 0) + size
    return {key: size for key, size in items.items() if size}


def _phase_of(peak: str) -> Phase:
    """Return the phase of a peak by its words: ``loss backward`` belongs to the loss."""
    phases: tuple[Phase, ...] = ("loss", "forward", "backward")
    return next((phase for phase in phases if phase in peak), "optimizer")
