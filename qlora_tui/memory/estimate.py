"""The estimate: one recipe on one model, itemised, in three tiers.

``estimate`` is what the Memory screen, the CLI, the runner and the demo call. Everything is pure Python and
takes a few milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from msgspec import structs

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.memory.calibration import FEWEST, Correction
from qlora_tui.memory.execution import Device, ExecutionConfig, trainer_execution
from qlora_tui.memory.explain import LABELS, ExplainContext, explanations
from qlora_tui.memory.layout import STYLES, Layout, build_layout
from qlora_tui.memory.levels import MemoryLevels, UncertaintyBand, context_bytes, corrected, tiers
from qlora_tui.memory.replay import replay
from qlora_tui.memory.static_memory import FROZEN, static_items
from qlora_tui.memory.step import Peak, peak_candidates, profile_step
from qlora_tui.memory.step_trace import StepTrace
from qlora_tui.memory.weights import gradient_bytes, optimizer_step_bytes
from qlora_tui.recipe.schema import Recipe

Precision = Literal["nf4", "int8", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("nf4", "int8", "fp16")
"""What the Memory screen shows side by side; fp16 stands for 16 bits of either kind."""


@dataclass(frozen=True)
class Item:
    """One part of the memory at the peak."""

    key: str
    label: str
    bytes: int
    explanation: str
    """One sentence, with the formula."""


@dataclass(frozen=True)
class Estimate:
    """Predicted memory of one recipe on one model."""

    method: str
    """nf4, fp4, int8 or none (16 bits)."""
    items: tuple[Item, ...]
    """What is there at the fullest moment, largest contributors named; they add up to ``process_bytes``."""
    allocated_bytes: int
    """In tensors: ``torch.cuda.max_memory_allocated``. On a CPU: tensors."""
    reserved_bytes: int
    """Held by torch's allocator: ``torch.cuda.max_memory_reserved``."""
    process_bytes: int
    """What the card (or, on a CPU, the system) sees of the process. This is what must fit."""
    band: UncertaintyBand
    """Where the process tier may really lie, and why."""
    peak_phase: str
    """When the peak comes: ``loss``, ``backward of layer 21``, ``optimizer step``."""
    path: ExecutionConfig
    exact: bool
    """The family's layer is written out; otherwise it is walked as Llama's."""
    notes: tuple[str, ...] = ()
    """What a person should know about this estimate: experts in 16 bits, an unknown family."""
    correction: Correction | None = None
    """What past runs on this machine say; it is in the figures where it ``applies``."""
    uncorrected_bytes: int = 0
    """The process tier before that."""

    @property
    def total_bytes(self) -> int:
        """The process tier: what must be free."""
        return self.process_bytes

    @property
    def correction_words(self) -> str:
        """``corrected +2 % from 3 runs``; empty where none were measured on this machine."""
        if self.correction is None:
            return ""
        runs = f"{self.correction.runs} run{'s' if self.correction.runs > 1 else ''}"
        if not self.correction.applies:
            return f"{runs} measured, {FEWEST} are needed to correct"
        return f"corrected {(self.process_bytes / self.uncorrected_bytes - 1) * 100:+.0f} % from {runs}"

    def bytes_of(self, key: str) -> int:
        """Of one item; 0 where it plays no part at the peak."""
        return sum(item.bytes for item in self.items if item.key == key)


def estimate(
    recipe: Recipe,
    architecture: Architecture,
    *,
    path: ExecutionConfig | None = None,
    device: Device | None = None,
    traced: StepTrace | None = None,
    capacity_bytes: int | None = None,
) -> Estimate:
    """Predict the memory of ``recipe`` on the model described by ``architecture``.

    Without ``path`` it is the one this project's trainer takes on ``device`` (a CUDA card of Ampere's
    generation where none is given). With ``traced``, a trace of this very recipe, the step is not walked but
    taken from there. With ``capacity_bytes``, the card's memory, the allocator gives back what is free before
    it takes more than that. Raises UserError for target modules the model does not have.
    """
    device = device or Device()
    path = path or trainer_execution(recipe, device, architecture)
    layout = build_layout(recipe, architecture, path)
    resident = static_items(recipe, architecture, layout, path)
    walked = profile_step(layout, path, recipe.lora.dropout)
    if traced is not None:
        layout = replace(layout, exact=True)
        moments = [_traced_moment(traced)]
    else:
        moments = peak_candidates(walked, layout, path)
        if path.accumulates:
            resident["gradients"] = gradient_bytes(layout, path)
    pool = None
    if path.device == "cuda":
        room = None if capacity_bytes is None else capacity_bytes - context_bytes(path)
        pool = replay(recipe, architecture, layout, path, walked, room)
    if not path.accumulates:
        moments.append(_optimizer_moment(layout, path))
    fullest = max(moments, key=lambda moment: moment.total_bytes)
    items = _together(resident, fullest)
    frozen = {key: size for key, size in resident.items() if key in FROZEN}
    loading = _together(frozen, Peak("loading", {"loading": loading_bytes(recipe, architecture, path)}))
    levels = tiers(items, fullest.total_bytes, pool, architecture, layout, path)
    # By the process: a step on a CPU also leaves holes and kernels, which loading does not.
    levels_at_loading = tiers(loading, 0, pool, architecture, layout, path)
    if levels_at_loading.process_bytes > levels.process_bytes:
        fullest, items, levels = Peak("loading", loading), loading, levels_at_loading
    before, correction = levels.process_bytes, device.correction
    if correction is not None and correction.applies:
        levels = corrected(levels, layout, correction)
    result = _assemble(recipe, architecture, layout, path, items, levels, fullest)
    if correction is None:
        return result
    return replace(result, correction=correction, uncorrected_bytes=before)


def _together(resident: dict[str, int], moment: Peak) -> dict[str, int]:
    items = dict(resident)
    for key, size in moment.items.items():
        items[key] = items.get(key, 0) + size
    return items


def _traced_moment(traced: StepTrace) -> Peak:
    gradients = min(traced.gradient_bytes, traced.step_bytes)
    return Peak("traced step", {"gradients": gradients, "activations": traced.step_bytes - gradients})


LOADERS = 4
"""Threads with which transformers reads weights (``core_model_loading.GLOBAL_WORKERS``)."""


def loading_bytes(recipe: Recipe, architecture: Architecture, path: ExecutionConfig) -> int:
    """What is there while weights are read: a card holds some tensors in 16 bits before each is quantized; a
    CPU has the whole file mapped. Weights that stay as they are stored are what is read."""
    if recipe.quantization.method == "none" and path.compute_bytes == 2:
        return 0
    if path.device == "cpu":
        return 2 * architecture.total_params
    sizes = sorted((2 * module.weight_params for module in architecture.modules), reverse=True)
    return sum(sizes[:LOADERS])


def _optimizer_moment(layout: Layout, path: ExecutionConfig) -> Peak:
    return Peak(
        "optimizer step",
        {"gradients": gradient_bytes(layout, path), "optimizer_step": optimizer_step_bytes(layout, path)},
    )


def _assemble(
    recipe: Recipe,
    architecture: Architecture,
    layout: Layout,
    path: ExecutionConfig,
    items: dict[str, int],
    levels: MemoryLevels,
    fullest: Peak,
) -> Estimate:
    sentences = explanations(ExplainContext(recipe, architecture, path, layout))
    everything = {**items, **levels.added}
    return Estimate(
        method=recipe.quantization.method,
        items=tuple(
            Item(key, label, everything[key], sentences.get(key, ""))
            for key, label in LABELS.items()
            if everything.get(key, 0) > 0
        ),
        allocated_bytes=levels.allocated_bytes,
        reserved_bytes=levels.reserved_bytes,
        process_bytes=levels.process_bytes,
        band=levels.band,
        peak_phase=fullest.phase,
        path=path,
        exact=layout.exact,
        notes=_notes(recipe, architecture, layout),
    )


def _notes(recipe: Recipe, architecture: Architecture, layout: Layout) -> tuple[str, ...]:
    notes = []
    if architecture.experts and recipe.quantization.method != "none":
        notes.append("The experts are fused parameters, which bitsandbytes leaves in 16 bits.")
    if architecture.model_type not in STYLES:
        notes.append(
            f"{architecture.model_type} layers have no formula: "
            + ("the step was traced." if layout.exact else "estimated as Llama's.")
        )
    return tuple(notes)


def with_precision(recipe: Recipe, precision: Precision) -> Recipe:
    """The same recipe with its base in another precision."""
    method: Literal["nf4", "int8", "none"] = "none" if precision == "fp16" else precision
    return structs.replace(recipe, quantization=structs.replace(recipe.quantization, method=method))


def precision_of(recipe: Recipe) -> Precision:
    """Which of the compared precisions the recipe asks for; fp4 takes what NF4 does."""
    methods: dict[str, Precision] = {"int8": "int8", "none": "fp16"}
    return methods.get(recipe.quantization.method, "nf4")


def compare(
    recipe: Recipe,
    architecture: Architecture,
    *,
    device: Device | None = None,
    path: ExecutionConfig | None = None,
    traced: StepTrace | None = None,
) -> dict[Precision, Estimate]:
    """The recipe in NF4, int8 and 16 bits, side by side. ``traced`` is of the recipe as it is."""
    return {
        precision: estimate(
            with_precision(recipe, precision),
            architecture,
            device=device,
            path=path,
            traced=traced if precision == precision_of(recipe) else None,
        )
        for precision in PRECISIONS
    }
