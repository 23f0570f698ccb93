"""The memory estimate of one recipe on one model: items, three levels, timeline, and verdict.

The Memory screen, the CLI, the runner and the demo call ``estimate``. Everything is pure Python and takes a
few milliseconds. The parts of a timeline are in the order of execution; their durations are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import msgspec

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.formatting import format_percent, join_words
from qlora_tui.memory.calibration import MIN_RUNS, Correction
from qlora_tui.memory.execution import Device, ExecutionConfig, trainer_execution
from qlora_tui.memory.explain import LABELS, explanations
from qlora_tui.memory.layout import Layout, build_layout
from qlora_tui.memory.levels import (
    BEYOND_RULES,
    STEP_UNCERTAINTY,
    UncertaintyBand,
    context_range,
    corrected,
    expected_pool,
    tiers,
)
from qlora_tui.memory.recording import StepTrace
from qlora_tui.memory.static_memory import FROZEN, adapter_bytes, optimizer_bytes, static_items
from qlora_tui.memory.step import (
    Moment,
    answers_moment,
    layer_input_bytes,
    peak_candidates,
    profile_step,
    step_moments,
)
from qlora_tui.memory.traces import NO_TRACES
from qlora_tui.memory.weights import StreamedWeights, streamed_weights
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe

Precision = Literal["nf4", "int8", "fp16"]
OUTLINE_NOTE = (
    "Until the layers are read from the model's transformers class, the estimate is based on an outline of "
    "the layers."
)
PRECISIONS: tuple[Precision, ...] = ("nf4", "int8", "fp16")
"""Precisions that the Memory screen compares; fp16 stands for both 16-bit dtypes."""


_CACHED = 512
"""Maximum number of cached estimates, of a few kilobytes each; the solver requests about a hundred."""
_encode = msgspec.msgpack.Encoder().encode

ADAPTER_ITEMS = ("adapter", "gradients", "optimizer", "optimizer_step")
"""Keys of the items that training an adapter adds, including the 16-bit copies of its weights."""
LOADING = "loading"
"""Value of ``Estimate.peak_phase`` if loading the model takes more memory than any training step."""


@dataclass(frozen=True)
class Item:
    """One item of the memory at the peak."""

    key: str
    label: str
    bytes: int
    explanation: str
    """One sentence with the formula."""


@dataclass(frozen=True)
class Estimate:
    """Predicted memory of one recipe on one model."""

    method: str
    """Quantization: nf4, fp4, int8 or none (16 bits)."""
    items: tuple[Item, ...]
    """Items at the peak that are not empty, in the order of ``LABELS``. Their sum is ``process_bytes``.

    If loading takes the most memory, the items are those of the training step, and one more item is the
    difference.
    """
    allocated_bytes: int
    """Bytes in tensors: ``torch.cuda.max_memory_allocated`` on a GPU."""
    reserved_bytes: int
    """Bytes held by torch's allocator: ``torch.cuda.max_memory_reserved`` on a GPU.

    On a CPU: tensors, gaps in the heap, code that oneDNN generates, and the tokenizer.
    """
    process_bytes: int
    """Bytes of the process as seen by the GPU driver (on a CPU, by the system). These bytes must fit."""
    band: UncertaintyBand
    """Uncertainty range of the process level, and its reason."""
    peak_phase: str
    """Name of the fullest moment, as in :attr:`.step.Moment.name`."""
    execution: ExecutionConfig
    exact: bool
    """Whether the step was traced, or the memory of all its layers follows from their shapes."""
    traced: bool = False
    """Whether the step was traced."""
    notes: tuple[str, ...] = ()
    """Notes for the user on this estimate, for example on experts in 16 bits or an unknown family."""
    correction: Correction | None = None
    """Correction from past runs on this machine, which the figures include if it ``applies``."""
    uncorrected_bytes: int = 0
    """Bytes of the process level before the correction; 0 if there are no past runs."""
    loading_process_bytes: int = 0
    """Peak of the process while the model is loaded."""
    host_bytes: int = 0
    """Host memory that a GPU run needs for streamed layers or offloaded layer inputs; usually 0.

    With streamed layers, it is at least the size of the whole base, which is first loaded into host memory.
    """

    @property
    def total_bytes(self) -> int:
        """Return the bytes of the process level, which must be free."""
        return self.process_bytes

    @property
    def step_bytes(self) -> int:
        """Return the bytes of the process in a training step, which loading may exceed."""
        return self.process_bytes - self.bytes_of(LOADING)

    @property
    def adapter_bytes(self) -> int:
        """Return the bytes of adapter, gradients, and the optimizer's states and workspace at the peak."""
        return sum(map(self.bytes_of, ADAPTER_ITEMS))

    @property
    def correction_words(self) -> str:
        """Return ``corrected +2% from 3 runs``, or that there are too few runs for a correction.

        Empty if no run was measured on this machine.
        """
        if self.correction is None:
            return ""
        runs = f"{self.correction.runs} run{'s' if self.correction.runs > 1 else ''}"
        if not self.correction.applies:
            return f"{runs} measured, {MIN_RUNS} are needed for a correction"
        return f"corrected {(self.process_bytes / self.uncorrected_bytes - 1) * 100:+.0f}% from {runs}"

    def bytes_of(self, key: str) -> int:
        """Return the bytes of one item; 0 if the item does not exist at the peak."""
        return sum(item.bytes for item in self.items if item.key == key)


def estimate(
    recipe: Recipe,
    architecture: Architecture,
    *,
    execution: ExecutionConfig | None = None,
    device: Device | None = None,
    capacity_bytes: int | None = None,
) -> Estimate:
    """Predict the memory of ``recipe`` on the model described by ``architecture``.

    ``execution`` defaults to this project's trainer on ``device`` (default: an Ampere GPU). If ``device`` has
    a trace of the step, the trace replaces the calculation. With ``capacity_bytes``, the GPU's memory, the
    allocator releases free segments before it exceeds this size. Raises UserError for target modules that the
    model does not have.

    Results without a trace are cached, because the solver and several screens request the same recipes
    repeatedly.
    """
    device = device or Device()
    execution = execution or trainer_execution(recipe, device, architecture)
    traced = device.traces.find(recipe, architecture, execution)
    bare = replace(device, traces=NO_TRACES)
    if traced is not None:
        return _calculate(recipe, architecture, execution, bare, traced, capacity_bytes)
    key = _RecipeKey(recipe, _encode(recipe))
    return cached_estimate(key, architecture, execution, bare, capacity_bytes)


@dataclass(frozen=True)
class _RecipeKey:
    """A recipe as a cache key; a recipe itself cannot be hashed, because it has dicts of patterns."""

    recipe: Recipe = field(compare=False)
    encoded: bytes


@lru_cache(_CACHED)
def cached_estimate(
    key: _RecipeKey,
    architecture: Architecture,
    execution: ExecutionConfig,
    device: Device,
    capacity_bytes: int | None,
) -> Estimate:
    """Compute :func:`estimate` for complete arguments, and cache the result."""
    return _calculate(key.recipe, architecture, execution, device, None, capacity_bytes)


def _calculate(
    recipe: Recipe,
    architecture: Architecture,
    execution: ExecutionConfig,
    device: Device,
    traced: StepTrace | None,
    capacity_bytes: int | None,
) -> Estimate:
    layout = build_layout(recipe, architecture, execution)
    streamed = streamed_weights(recipe, architecture, execution)
    step_profile = pool = None
    if traced is not None:
        resident, moments, pool = dict(traced.resident), list(traced.moments), traced.pool
    else:
        resident, step_profile = static_items(layout), profile_step(layout)
        if execution.accumulates:
            resident["gradients"] = adapter_bytes(layout)
        moments = step_moments(step_profile, layout)
    moments.append(answers_moment(layout))
    fullest = max(moments, key=lambda moment: moment.total_bytes)
    items = _sum(resident, fullest.items)
    frozen = {key: size for key, size in resident.items() if key in FROZEN}
    loading = _sum(frozen, {"loading": loading_bytes(recipe, architecture, execution)})
    if step_profile is not None and execution.device == "cuda":
        room = None if capacity_bytes is None else capacity_bytes - context_range(execution)[1]
        pool = expected_pool(layout, step_profile, sum(items.values()), room)
    levels = tiers(items, fullest.total_bytes, pool, layout, traced=traced is not None)
    # Compare process bytes: a step on a CPU also leaves heap gaps and kernels, which loading does not.
    levels_at_loading = tiers(loading, 0, pool, layout)
    before = max(levels.process_bytes, levels_at_loading.process_bytes)
    correction = device.correction
    if correction is not None and correction.applies:
        levels = corrected(levels, fullest.total_bytes, layout, correction, traced=traced is not None)
        levels_at_loading = corrected(levels_at_loading, 0, layout, correction)
    items |= levels.added
    if levels_at_loading.process_bytes > levels.process_bytes:
        items[LOADING] = levels_at_loading.process_bytes - levels.process_bytes
        fullest, levels = Moment("loading", LOADING, loading), levels_at_loading
    band = levels.band
    if traced is not None and traced.uncertain and execution.device == "cuda":
        low = max(0, band.low_bytes - fullest.total_bytes)
        band = replace(band, low_bytes=low, reason=f"kernels of {join_words(list(traced.uncertain))}")
    sentences = explanations(layout)
    return Estimate(
        method=recipe.quantization.method,
        items=tuple(
            Item(key, label, items[key], sentences.get(key, ""))
            for key, label in LABELS.items()
            if items.get(key, 0) > 0
        ),
        allocated_bytes=levels.allocated_bytes,
        reserved_bytes=levels.reserved_bytes,
        process_bytes=levels.process_bytes,
        band=band,
        peak_phase=fullest.name,
        execution=execution,
        exact=traced is not None or layout.exact,
        traced=traced is not None,
        notes=_notes(layout, items, traced),
        correction=correction,
        uncorrected_bytes=before if correction else 0,
        loading_process_bytes=levels_at_loading.process_bytes,
        host_bytes=_host_bytes(resident, streamed, layout),
    )


def _host_bytes(resident: dict[str, int], streamed: StreamedWeights | None, layout: Layout) -> int:
    """Return the host memory of a run on a GPU.

    It holds the whole base if some of its layers are streamed, and the inputs of all layers if these are
    offloaded.
    """
    execution = layout.execution
    size = len(layout.layers) * layer_input_bytes(layout) if execution.offloads_inputs else 0
    if streamed is None or execution.device == "cpu":
        return size
    return size + streamed.host_bytes + sum(resident.get(key, 0) for key in FROZEN if key != "slots")


LOADERS = 4
"""Number of weights assumed to be in 16 bits at the same time while a GPU loads a base.

transformers 5.0 to 5.3 read weights in four threads (``core_model_loading.GLOBAL_WORKERS``).
"""


def loading_bytes(recipe: Recipe, architecture: Architecture, execution: ExecutionConfig) -> int:
    """Return the additional bytes while weights are read, beyond the frozen weights.

    A GPU holds some tensors in 16 bits before each is quantized; a CPU has the whole file mapped. The result
    is 0 if all weights stay in 16 bits, and on a GPU if layers are streamed, because the base is then loaded
    on the CPU.
    """
    if recipe.quantization.method == "none" and execution.compute_itemsize == 2:
        return 0
    if execution.streamed_layers and execution.device == "cuda":
        return 0  # a base with streamed layers is loaded on the CPU
    if execution.device == "cpu":
        return 2 * architecture.total_params
    sizes = sorted((2 * module.weight_params for module in architecture.modules), reverse=True)
    return sum(sizes[:LOADERS])


def _notes(layout: Layout, items: dict[str, int], traced: StepTrace | None) -> tuple[str, ...]:
    recipe = layout.recipe
    notes = []
    if items.get("int8_inputs"):
        notes.append(
            "int8 keeps the inputs of its linear layers although activations are recomputed: a small model "
            "or a large batch takes more than in NF4 or 16 bits."
        )
    if layout.experts_in_16_bits and recipe.quantization.method != "none":
        notes.append(f"The experts stay in 16 bits: {_why_in_16_bits(recipe)}.")
    if traced is not None:
        if traced.uncertain and layout.execution.device == "cuda":
            notes.append(
                f"{join_words(list(traced.uncertain))}: traced with transformers' own code, which it uses if "
                "the kernels for such layers are not installed. With the kernels, a step takes less memory."
            )
    elif layout.architecture.is_outline:
        notes.append(OUTLINE_NOTE)
    elif layout.repeats_states:
        notes.append(
            "The model copies hidden states for its experts, runs its layers several times, or divides them "
            "into more parts than usual. The shapes of its weights do not show how much memory this takes."
        )
    elif layout.computes_more_scores:
        notes.append(
            "The model has its own code for attention, or for choosing the tokens to attend to; its scores "
            "are estimated from the number of heads."
        )
    elif layout.architecture.own_code:
        notes.append(
            "This model's class has its own attention code, or cannot be test-run without weights. So the "
            "memory that it uses in addition to its modules is unknown."
        )
    elif not layout.exact:
        notes.append(
            "Some layers mix tokens without attention: what they keep for the backward pass "
            "depends on the installed kernels, and is estimated from the widths of their projections."
        )
    elif BEYOND_RULES * layout.architecture.saves_beyond_rules > STEP_UNCERTAINTY:
        share = format_percent(layout.architecture.saves_beyond_rules)
        notes.append(
            f"In a test, the tensors that layers of this class kept for the backward pass took up to {share} "
            "more or less memory than the shapes of the modules suggest."
        )
    return tuple(notes)


def _why_in_16_bits(recipe: Recipe) -> str:
    if recipe.quantization.method == "int8":
        return "int8 does not quantize fused parameters"
    if not recipe.quantization.experts:
        return "quantization.experts is off"
    return "bitsandbytes leaves fused parameters as they are"


def with_precision(recipe: Recipe, precision: Precision) -> Recipe:
    """Return the recipe with its base model in another precision."""
    method: Literal["nf4", "int8", "none"] = "none" if precision == "fp16" else precision
    return replace_setting(recipe, "quantization.method", method)


def precision_of(recipe: Recipe) -> Precision:
    """Return which of the compared precisions the recipe uses; fp4 counts as NF4."""
    methods: dict[str, Precision] = {"int8": "int8", "none": "fp16"}
    return methods.get(recipe.quantization.method, "nf4")


def compare(
    recipe: Recipe,
    architecture: Architecture,
    *,
    device: Device | None = None,
    execution: ExecutionConfig | None = None,
) -> dict[Precision, Estimate]:
    """Estimate the recipe in NF4, int8 and 16 bits."""
    return {
        precision: estimate(
            with_precision(recipe, precision), architecture, device=device, execution=execution
        )
        for precision in PRECISIONS
    }


def why_int8_is_larger(int8: Estimate, fp16: Estimate) -> str:
    """Return why a recipe takes more memory in int8 than in 16 bits; empty if it does not."""
    if int8.total_bytes <= fp16.total_bytes or not int8.bytes_of("int8_inputs"):
        return ""
    return "int8 needs more than fp16 here: it stores layer inputs that fp16 recomputes."


TIGHT_SHARE = 0.05
"""Share of the memory that must be left over for a fit that is not tight.

With less left over, another process or a longer sequence can end the run.
"""


@dataclass(frozen=True)
class Verdict:
    """The verdict in one word, with the figures behind it."""

    word: Literal["fits", "tight", "does not fit", "uncertain"]
    needed_bytes: int
    low_bytes: int
    high_bytes: int
    available_bytes: int
    reason: str
    """Reason for the width of the uncertainty range."""
    is_exact: bool = False
    """Whether the step was traced rather than calculated."""
    used_bytes: int = 0
    """Estimated memory of a run that may use all of ``available_bytes``, in bytes; 0 if unknown. Such a run
    uses more than ``needed_bytes`` if this makes it faster.
    """

    @property
    def spare_bytes(self) -> int:
        """Return the bytes that the estimate leaves over; negative if it exceeds the memory."""
        return self.available_bytes - self.needed_bytes

    @property
    def fits_even_if_tight(self) -> bool:
        """Return whether the upper end of the range fits, with or without a margin."""
        return self.word in ("fits", "tight")

    @property
    def fits_with_margin(self) -> bool:
        """Return whether even the upper end of the range leaves 5 % of the memory free (``TIGHT_SHARE``)."""
        return self.high_bytes <= self.available_bytes * (1 - TIGHT_SHARE)


def check_fit(estimated: Estimate, available_bytes: int) -> Verdict:
    """Compare an estimate's range with the memory.

    * ``fits``: the upper end of the range fits, and the estimate leaves at least 5 % of the memory free.
    * ``tight``: the upper end fits, but the estimate leaves less than 5 % of the memory free.
    * ``uncertain``: the lower end fits, but not the upper end.
    * ``does not fit``: not even the lower end fits.

    The margin is that of the estimate, the figure that is shown. So an estimate that is tight is always
    larger than one that fits.
    """
    band = estimated.band
    word: Literal["fits", "tight", "does not fit", "uncertain"]
    if band.low_bytes > available_bytes:
        word = "does not fit"
    elif band.high_bytes > available_bytes:
        word = "uncertain"
    elif estimated.process_bytes > available_bytes * (1 - TIGHT_SHARE):
        word = "tight"
    else:
        word = "fits"
    return Verdict(
        word,
        needed_bytes=estimated.process_bytes,
        low_bytes=band.low_bytes,
        high_bytes=band.high_bytes,
        available_bytes=available_bytes,
        reason=band.reason,
        is_exact=estimated.traced,
    )


OVERHEAD = "overhead"
"""Item of a moment for everything that is not in tensors: context, libraries, and the allocator's slack."""
LOADING_PARTS = 8
"""Number of moments into which loading is divided."""


def step_timeline(
    recipe: Recipe, architecture: Architecture, estimated: Estimate, traced: StepTrace | None = None
) -> tuple[Moment, ...]:
    """Return the moments of loading and of a step, in order of time.

    Args:
        recipe: the recipe, in the precision of the estimate.
        architecture: architecture of its model.
        estimated: its estimate; the largest moment is the estimate's peak.
        traced: a trace of this exact recipe, if the estimate was made with one.
    """
    execution = estimated.execution
    layout = build_layout(recipe, architecture, execution)
    if traced is not None:
        resident, peaks = dict(traced.resident), list(traced.moments)
    else:
        resident, peaks = static_items(layout), step_moments(profile_step(layout), layout, every_layer=True)
        if execution.accumulates:
            resident["gradients"] = adapter_bytes(layout)
    if execution.pages_states:
        resident["optimizer"] = optimizer_bytes(layout)
    frozen = {key: size for key, size in resident.items() if key in FROZEN}
    most = max(peak.total_bytes for peak in peaks) + sum(resident.values())
    outside = {OVERHEAD: estimated.step_bytes - most}
    moments = _loading(frozen, loading_bytes(recipe, architecture, execution), estimated)
    moments += [Moment(peak.phase, peak.name, _sum(resident, peak.items, outside)) for peak in peaks]
    moments.append(Moment("optimizer", "after the step", _sum(resident, outside)))
    return tuple(moments)


def _loading(frozen: dict[str, int], read_bytes: int, estimated: Estimate) -> list[Moment]:
    """Return the moments of loading the weights. Memory is highest when the last weights are read."""
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


def closed_form(recipe: Recipe, architecture: Architecture, execution: ExecutionConfig) -> dict[str, int]:
    """Return the closed-form estimate of the figures that a trace contains: frozen weights, adapter,
    gradients, and the step's peak beyond weights and adapter.
    """
    layout = build_layout(recipe, architecture, execution)
    resident = static_items(layout)
    gradients = adapter_bytes(layout)
    step = max(peak.total_bytes for peak in peak_candidates(profile_step(layout), layout))
    return {
        "frozen": sum(resident.get(key, 0) for key in FROZEN),
        "adapter": resident["adapter"],
        "gradients": gradients,
        "step": step + (gradients if execution.accumulates else 0),
    }
