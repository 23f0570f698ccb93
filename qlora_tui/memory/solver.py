"""Finds the largest settings that fit, the cheapest changes that make a recipe fit, and the largest model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from msgspec import structs

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_number
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import Estimate, Verdict, check_fit, estimate
from qlora_tui.memory.execution import Device, trainer_execution
from qlora_tui.memory.step_choice import describe_slowdown
from qlora_tui.memory.weights import frozen_weights, quantized_experts
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import ALL_LINEAR, Recipe

Key = TypeVar("Key")

LENGTH_STEP = 128
MAX_ROWS = 1024
_STREAMING_STEPS = 16
RANKS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SMALLER_STATES = {
    "adamw": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_8bit",
    "lion": "lion_8bit",
}
"""For an optimizer, the optimizer of the same kind with 8-bit states."""


@dataclass(frozen=True)
class WhatFits:
    """Largest value of each setting that fits if the others are unchanged; 0 if none fits."""

    sequence_length: int
    micro_batch: int
    rank: int


@dataclass(frozen=True)
class MemorySaving:
    """One change to a recipe, or several combined ones, and the effect."""

    label: str
    """Label of the change: ``Recompute activations``, ``Micro-batch 4 → 2, accumulation 4 → 8``."""
    cost: str
    """Cost of the change in a few words, such as ``about a third slower``; empty if it has none."""
    settings: dict[str, Any]
    """Dotted keys and values, in the form of ``--set``."""
    recipe: Recipe
    estimate: Estimate
    verdict: Verdict

    @property
    def fits(self) -> bool:
        return self.verdict.fits_even_if_tight


def estimate_variants(
    variants: Iterable[tuple[Key, Recipe]], architecture: Architecture, device: Device
) -> dict[Key, Estimate]:
    """Estimate variants of a recipe: other lengths, ranks, targets, precisions or presets.

    Each takes about 10 ms. Variants whose targets the model does not have are left out.
    """
    estimates = {}
    for key, recipe in variants:
        with suppress(UserError):
            estimates[key] = estimate(recipe, architecture, device=device)
    return estimates


def what_if(
    variants: Iterable[tuple[Key, Recipe]], architecture: Architecture, budget: MemoryBudget
) -> dict[Key, Verdict]:
    """Return whether variants of a recipe fit (:func:`estimate_variants`)."""
    estimates = estimate_variants(variants, architecture, budget.device)
    return {key: check_fit(estimated, budget.bytes) for key, estimated in estimates.items()}


def largest_settings(
    recipe: Recipe, architecture: Architecture, available_bytes: int, *, device: Device | None = None
) -> WhatFits:
    """Return the largest sequence length, micro-batch and rank that fit in ``available_bytes``."""

    def fits(key: str, value: int) -> bool:
        return check_fit(
            estimate(replace_setting(recipe, key, value), architecture, device=device), available_bytes
        ).fits_even_if_tight

    longest = (architecture.max_positions or 131_072) // LENGTH_STEP
    return WhatFits(
        sequence_length=largest_fitting(longest, lambda n: fits("data.max_length", n * LENGTH_STEP))
        * LENGTH_STEP,
        micro_batch=largest_fitting(MAX_ROWS, lambda n: fits("training.micro_batch_size", n)),
        rank=max((rank for rank in RANKS if fits("lora.rank", rank)), default=0),
    )


def largest_fitting(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from 1 to ``most`` for which ``fits`` is true, by bisection; 0 for none."""
    if most < 1 or not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def cheapest_changes(
    recipe: Recipe, architecture: Architecture, available_bytes: int, *, device: Device | None = None
) -> tuple[MemorySaving, ...]:
    """Return single changes that make the recipe fit, the least costly first.

    If no single change is enough, changes are combined, cheapest first, into one :class:`MemorySaving`. Empty
    if the recipe already fits, or if all changes together are not enough.
    """
    whole = estimate(recipe, architecture, device=device)
    if check_fit(whole, available_bytes).fits_even_if_tight:
        return ()
    device = device or Device()
    offers = list(_offers(recipe, architecture, device))
    changes = [_gentlest(recipe, architecture, available_bytes, device, offer) for offer in offers]
    together = _together(recipe, architecture, available_bytes, device)
    return tuple(change for change in changes if change.fits) or tuple(c for c in together if c.fits)


def minimum_bytes(recipe: Recipe, architecture: Architecture, *, device: Device | None = None) -> int:
    """Return the memory that the recipe takes after all changes that save memory."""
    result = estimate(recipe, architecture, device=device)
    for change in _together(recipe, architecture, 0, device or Device()):
        result = change.estimate
    return result.process_bytes


def _together(
    recipe: Recipe, architecture: Architecture, available_bytes: int, device: Device
) -> Iterator[MemorySaving]:
    """Yield the combined changes after each change that saves memory, until the recipe fits."""
    taken: list[MemorySaving] = []
    now, size = recipe, estimate(recipe, architecture, device=device).process_bytes
    for offer in _offers(recipe, architecture, device):
        change = _gentlest(now, architecture, available_bytes, device, offer)
        if change.estimate.process_bytes >= size:
            continue
        taken.append(change)
        now, size = change.recipe, change.estimate.process_bytes
        label = "; ".join(part.label for part in taken)
        cost = "; ".join(dict.fromkeys(part.cost for part in taken if part.cost))
        settings = {key: value for part in taken for key, value in part.settings.items()}
        yield MemorySaving(label, cost, settings, now, change.estimate, change.verdict)
        if change.fits:
            return


@dataclass(frozen=True)
class SavingOption:
    """One way to save memory, with the changes of settings from the mildest to the strongest."""

    cost: str | None
    """Description of the cost; None if the cost is time spent copying data, which depends on the value."""
    steps: tuple[tuple[str, dict[str, Any]], ...]


def _gentlest(
    recipe: Recipe,
    architecture: Architecture,
    available_bytes: int,
    device: Device,
    offer: SavingOption,
) -> MemorySaving:
    """Return the first value of the option that fits, or its last value if none fits."""
    for label, settings in offer.steps:
        changed = recipe
        for key, value in settings.items():
            changed = replace_setting(changed, key, value)
        result = estimate(changed, architecture, device=device)
        cost = describe_slowdown(changed, architecture, device) if offer.cost is None else offer.cost
        change = MemorySaving(label, cost, settings, changed, result, check_fit(result, available_bytes))
        if change.fits:
            break
    return change


def _offers(recipe: Recipe, architecture: Architecture, device: Device) -> Iterator[SavingOption]:
    """Yield changes that save memory, the least costly first."""
    training, quantization, lora = recipe.training, recipe.quantization, recipe.lora
    if recipe.model.attention == "eager":
        yield _single("", "Attention eager → auto", "model.attention", "auto")
    if quantization.method in ("nf4", "fp4") and not quantization.double_quantization:
        yield _single("", "Double quantization", "quantization.double_quantization", True)
    with_experts = structs.replace(quantization, experts=True)
    if not quantization.experts and quantized_experts(with_experts, architecture) != "none":
        yield _single("slightly less accurate", "Quantize experts", "quantization.experts", True)
    if same_kind := _SMALLER_STATES.get(training.optimizer):
        yield _single("", f"Optimizer {training.optimizer} → {same_kind}", "training.optimizer", same_kind)
    if training.micro_batch_size > 1:
        yield SavingOption("same effective batch, a little slower", tuple(_smaller_batches(recipe)))
    if training.gradient_checkpointing == "off":
        yield _single("a third slower", "Recompute activations", "training.gradient_checkpointing", "on")
    if device.kind == "cuda" and training.gradient_checkpointing in ("auto", "on"):
        step = ("Keep layer inputs in host memory", {"training.gradient_checkpointing": "offload"})
        yield SavingOption(None, (step,))
    if quantization.method in ("none", "int8"):
        label = "16 bits → NF4" if quantization.method == "none" else "int8 → NF4"
        yield _single("slightly less accurate", label, "quantization.method", "nf4")
    if lora.use_dora:
        yield _single("plain LoRA", "DoRA off", "lora.use_dora", False)
    if lora.dropout:
        yield _single(
            "less regularization", f"Dropout {format_number(lora.dropout)} → 0", "lora.dropout", 0.0
        )
    if steps := tuple(_more_streamed_layers(recipe, architecture, device)):
        yield SavingOption(None, steps)
    if recipe.data.max_length >= 2 * LENGTH_STEP:
        yield SavingOption("longer samples are cut or dropped", tuple(_shorter_rows(recipe)))
    if lora.train_embeddings:
        cost = "new words and characters are learned less well"
        yield _single(cost, "Train embeddings off", "lora.train_embeddings", False)
    if lora.rank > RANKS[0]:
        smaller = [rank for rank in reversed(RANKS) if rank < lora.rank]
        steps = tuple((f"Rank {lora.rank} → {rank}", {"lora.rank": rank}) for rank in smaller)
        yield SavingOption("a smaller adapter", steps)
    narrow = ("q_proj", "v_proj")
    if set(narrow) <= set(architecture.kinds()) and set(lora.target_modules) != set(narrow):
        yield _single("a weaker adapter", "Targets → q_proj, v_proj", "lora.target_modules", narrow)


def _single(cost: str, label: str, key: str, value: object) -> SavingOption:
    return SavingOption(cost, ((label, {key: value}),))


def _smaller_batches(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    was, accumulated = recipe.training.micro_batch_size, recipe.training.gradient_accumulation
    rows = was
    while rows > 1:
        rows //= 2
        steps = min(-(-recipe.effective_batch // rows), 65_536)
        label = f"Micro-batch {was} → {rows}, accumulation {accumulated} → {steps}"
        yield label, {"training.micro_batch_size": rows, "training.gradient_accumulation": steps}


def _more_streamed_layers(
    recipe: Recipe, architecture: Architecture, device: Device
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield settings with increasing numbers of streamed layers.

    Yields nothing on a CPU, with DoRA, or if the base does not fit in host memory.
    """
    if device.kind == "cpu" or recipe.lora.use_dora:
        return
    most, now = architecture.layers, recipe.quantization.streamed_layers
    base = frozen_weights(recipe, architecture, trainer_execution(recipe, device, architecture))
    if device.host_bytes is not None and sum(base.values()) > device.host_bytes:
        return
    for count in range(now + 1, most + 1):
        # Try multiples of a sixteenth of the model, because each takes an estimate.
        if count % -(-most // _STREAMING_STEPS) and count != most:
            continue
        settings: dict[str, Any] = {"quantization.streamed_layers": count}
        if recipe.training.gradient_checkpointing == "off":
            settings["training.gradient_checkpointing"] = "on"
        yield f"Stream {count} of {most} layers from host memory", settings


def _shorter_rows(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    was = recipe.data.max_length
    length = was
    while length >= 2 * LENGTH_STEP:
        length = length // 2 // LENGTH_STEP * LENGTH_STEP
        yield f"Sequence length {was:,} → {length:,}", {"data.max_length": length}


_SHAPES = (
    ("0.5B", 896, 4864, 24, 14, 2, 151_936, True),
    ("1.5B", 1536, 8960, 28, 12, 2, 151_936, True),
    ("3B", 2048, 11_008, 36, 16, 2, 151_936, True),
    ("7B", 3584, 18_944, 28, 28, 4, 152_064, False),
    ("14B", 5120, 13_824, 48, 40, 8, 152_064, False),
    ("32B", 5120, 27_648, 64, 40, 8, 152_064, False),
    ("72B", 8192, 29_568, 80, 64, 8, 152_064, False),
)


def largest_model_size(recipe: Recipe, available_bytes: int, *, device: Device | None = None) -> str | None:
    """Return the largest class of models that fits, such as ``7B``; None if even the smallest does not fit.

    Target modules are assumed to be ``all-linear``, because another model has other modules.
    """
    all_linear = replace_setting(recipe, "lora.target_modules", (ALL_LINEAR,))
    largest = None
    for label, *_ in _SHAPES:
        result = estimate(all_linear, _architecture(label), device=device)
        if not check_fit(result, available_bytes).fits_even_if_tight:
            break
        largest = label
    return largest


@lru_cache
def _architecture(label: str) -> Architecture:
    shape = next(shape for shape in _SHAPES if shape[0] == label)
    _, hidden, inner, layers, heads, kv_heads, vocabulary, tied = shape
    return parse_architecture(
        {
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": 32_768,
            "hidden_act": "silu",
            "tie_word_embeddings": tied,
        }
    )
