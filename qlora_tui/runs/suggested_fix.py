"""Fixes for a warning or failure, applied with one key: a request to the trainer, or a changed recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from msgspec import structs

from qlora_tui.formatting import format_rate
from qlora_tui.recipe.fields import format_value, get_setting, setting_name
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.events import PREPARING_PHASES, Failed, Health, RunEnded
from qlora_tui.runs.memory_retry import RetryPlan, reduce_memory
from qlora_tui.runs.status import ACTIVE, State

_MIN_LENGTH = 128
FEW_STEPS = 10
"""Number of optimizer steps below which a run learns hardly anything, and a check warns."""

_REPLAY = 0.1
"""Amount by which a fix for forgetting raises ``training.replay_share``, the share of the base's answers
among the samples.
"""
_MOST_REPLAY = 0.5


@dataclass(frozen=True)
class SuggestedFix:
    """A new learning rate, a stop, or changes for the next run."""

    label: str
    """Description of the fix, such as ``halve the learning rate of this run, to 1e-4``."""
    rate: float | None = None
    """Learning rate to request from the running trainer."""
    stop: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the next run, by path."""
    evidence: str = ""
    """Evidence of the warning that the fix is for; empty if it is for a failure or a check."""
    kind: str = ""
    """Kind of this warning, such as ``forgetting``."""

    @property
    def short_label(self) -> str:
        """The settings of the next run, such as ``replay share 0.1``; the whole label if none changes."""
        settings = (f"{setting_name(path)} {format_value(value)}" for path, value in self.changes.items())
        return " and ".join(settings) or self.label


def suggest_fix(
    state: State,
    health: Sequence[Health],
    ending: RunEnded | None,
    recipe: Recipe | None,
    last_plan: RetryPlan,
) -> SuggestedFix | None:
    """Return the fix for the latest warning or failure that has one; None if there is none.

    ``last_plan`` has the settings that the last attempt overrode; all others are the recipe's.
    """
    if recipe is None:
        return None
    if isinstance(ending, Failed) and ending.kind == "out_of_memory":
        if ending.phase not in PREPARING_PHASES:
            return _next_run(recipe, _less_memory(recipe, last_plan))
        # The model alone takes too much memory.
        is_large = recipe.quantization.method in ("int8", "none")
        return _next_run(recipe, {"quantization.method": "nf4"} if is_large else {})
    for warning in reversed(health):
        fix = _fix_for(warning.kind, state, recipe)
        if fix is not None:
            return replace(fix, evidence=warning.evidence, kind=warning.kind)
    return None


def _fix_for(kind: str, state: State, recipe: Recipe) -> SuggestedFix | None:
    training = recipe.training
    half = {"training.learning_rate": float(f"{training.learning_rate / 2:.3g}")}
    match kind:
        case "exploding_gradient" if state in ACTIVE:
            rate = half["training.learning_rate"]
            return SuggestedFix(f"halve the learning rate of this run, to {format_rate(rate)}", rate=rate)
        case "plateau" if state in ACTIVE:
            return SuggestedFix("save the adapter and stop this run", stop=True)
        case "worse_than_before" if state in ACTIVE:
            return SuggestedFix("save the adapter and stop this run", stop=True)
        case "worse_than_before":
            return _next_run(recipe, {"training.learning_rate": float(f"{training.learning_rate / 10:.3g}")})
        case "nan_loss" | "exploding_gradient" if state not in ACTIVE:
            return _next_run(recipe, half)
        case "gradients_overflow" if state not in ACTIVE:
            # If the recipe requests float16, the GPU may support bfloat16; if it does not, the GPU supports
            # only float16.
            was_chosen = recipe.quantization.compute_dtype == "float16"
            return _next_run(recipe, {"quantization.compute_dtype": "auto" if was_chosen else "float32"})
        case "forgetting" | "general_answers" if state not in ACTIVE:
            share = min(_MOST_REPLAY, training.replay_share + _REPLAY)
            # If half of the samples are replayed already, only the learning rate can be changed.
            more = {"training.replay_share": float(f"{share:.3g}")}
            return _next_run(recipe, half if training.replay_share >= _MOST_REPLAY else more)
        case "few_steps" if 0 < training.max_steps < FEW_STEPS:
            return _next_run(recipe, {"training.max_steps": 0})
        case "few_steps" if training.gradient_accumulation > 1:
            return _next_run(recipe, {"training.gradient_accumulation": training.gradient_accumulation // 2})
        case _:
            return None


def _less_memory(recipe: Recipe, last_plan: RetryPlan) -> dict[str, Any]:
    """Return settings that need less memory than the last attempt. Samples are shortened only as a last
    resort.
    """
    last_plan = structs.replace(last_plan, kept_layers=None, resident_layers=None)
    plan = reduce_memory(recipe, last_plan)
    changes = {f"training.{name}": value for name, value in (plan or last_plan).overrides().items()}
    if plan is None:
        length = recipe.data.max_length
        changes["data.max_length"] = min(length, max(_MIN_LENGTH, length // 2))
    return changes


def _next_run(recipe: Recipe, changes: dict[str, Any]) -> SuggestedFix | None:
    differences = [
        f"{setting_name(path)} {format_value(value)} instead of {format_value(get_setting(recipe, path))}"
        for path, value in changes.items()
        if value != get_setting(recipe, path)
    ]
    return (
        SuggestedFix(f"prepare a run with {' and '.join(differences)}", changes=changes)
        if differences
        else None
    )
