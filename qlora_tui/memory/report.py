"""The output of ``qlora-tui estimate --json``: stable keys, bytes as integers."""

from __future__ import annotations

from typing import Any

from qlora_tui.catalog.architecture_types import Architecture, context_length_warning
from qlora_tui.formatting import join_words
from qlora_tui.memory.estimate import (
    Estimate,
    check_fit,
    closed_form,
    compare,
    estimate,
    precision_of,
)
from qlora_tui.memory.execution import Device, trainer_execution
from qlora_tui.memory.explain import describe_choice
from qlora_tui.memory.recording import StepTrace
from qlora_tui.memory.solver import cheapest_changes, largest_model_size, largest_settings, minimum_bytes
from qlora_tui.memory.step_choice import choose_step, describe_host_memory
from qlora_tui.recipe.schema import Recipe


def as_json(
    recipe: Recipe,
    architecture: Architecture,
    available_bytes: int | None,
    *,
    device: Device | None = None,
) -> dict[str, Any]:
    """Return ``{"precisions": {"nf4": …, "int8": …, "fp16": …}, "what_fits": …, "cheapest_changes": …}``.

    Without ``available_bytes`` verdicts and ``largest_settings`` are null. ``minimum_bytes`` is set if even
    all changes together do not fit, and is the memory with all of them.
    """
    compared = compare(recipe, architecture, device=device)
    fitting: dict[str, Any] | None = None
    changes: list[dict[str, Any]] = []
    least: int | None = None
    if available_bytes is not None:
        largest = largest_settings(recipe, architecture, available_bytes, device=device)
        fitting = {
            "sequence_length": largest.sequence_length,
            "micro_batch": largest.micro_batch,
            "rank": largest.rank,
            "model_class": largest_model_size(recipe, available_bytes, device=device),
        }
        changes = [
            {
                "label": change.label,
                "cost": change.cost,
                "settings": change.settings,
                "total_bytes": change.estimate.total_bytes,
                "verdict": change.verdict.word,
                "traced": change.verdict.is_exact,
            }
            for change in cheapest_changes(recipe, architecture, available_bytes, device=device)
        ]
        if not changes and not check_fit(compared[precision_of(recipe)], available_bytes).fits_even_if_tight:
            least = minimum_bytes(recipe, architecture, device=device)
    own = (device or Device()).traces.find(recipe, architecture, compared[precision_of(recipe)].execution)
    choice = (
        None if available_bytes is None else choose_step(recipe, architecture, available_bytes, device=device)
    )
    too_long = context_length_warning(recipe.data.max_length, architecture)
    return {
        "available_bytes": available_bytes,
        "precisions": {name: one_as_json(result, available_bytes) for name, result in compared.items()},
        "trace": own and trace_as_json(own, recipe, architecture, device or Device()),
        "what_fits": fitting,
        "step": choice
        and {
            "micro_batch_size": choice.recipe.training.micro_batch_size,
            "gradient_accumulation": choice.recipe.training.gradient_accumulation,
            "optimizer": choice.recipe.training.optimizer,
            "kept_layers": choice.kept_layers,
            "layers": architecture.layers,
            "total_bytes": choice.estimate.total_bytes,
            "least_free_bytes": choice.least_free_bytes,
            "speedup": round(choice.speedup, 3),
            "description": describe_choice(choice),
        },
        "host_memory": describe_host_memory(recipe, architecture, device or Device()),
        "cheapest_changes": changes,
        "least_bytes": least,
        "warnings": [] if too_long is None else [f"{too_long.what} {too_long.why} {too_long.fix}"],
    }


def trace_as_json(
    traced: StepTrace, recipe: Recipe, architecture: Architecture, device: Device
) -> dict[str, Any]:
    """Return the bytes by item of the trace and of the closed form, and whether the latter is exact."""
    closed = closed_form(recipe, architecture, trainer_execution(recipe, device, architecture))
    return {
        "precision": precision_of(recipe),
        "transformers": traced.transformers,
        "how": describe_trace(traced),
        "exact": estimate(recipe, architecture, device=device).exact,
        "items": {
            key: {"traced": size, "closed_form": closed[key]} for key, size in traced.figures().items()
        },
    }


def describe_trace(traced: StepTrace) -> str:
    """Return a description of the libraries with which a step was traced."""
    text = f"exact: traced with transformers {traced.transformers}"
    if traced.uncertain:
        text += f", with its own code in place of the kernels of {join_words(list(traced.uncertain))}"
    return text


def one_as_json(result: Estimate, available_bytes: int | None) -> dict[str, Any]:
    """Return the entry of one precision."""
    return {
        "total_bytes": result.total_bytes,
        "host_bytes": result.host_bytes,
        "items": {item.key: item.bytes for item in result.items},
        "explanations": {item.key: item.explanation for item in result.items},
        "tiers": {
            "allocated": result.allocated_bytes,
            "reserved": result.reserved_bytes,
            "process": result.process_bytes,
        },
        "band": {"low": result.band.low_bytes, "high": result.band.high_bytes, "reason": result.band.reason},
        "verdict": None if available_bytes is None else check_fit(result, available_bytes).word,
        "peak_phase": result.peak_phase,
        "correction": result.correction
        and {
            "runs": result.correction.runs,
            "applied": result.correction.applies,
            "uncorrected_bytes": result.uncorrected_bytes,
        },
        "exact": result.exact,
        "traced": result.traced,
        "notes": list(result.notes),
    }
