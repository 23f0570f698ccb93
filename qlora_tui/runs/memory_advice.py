"""Runs that ran out of memory: what killed them, and the cheapest change that would fit."""

from __future__ import annotations

import re
from pathlib import Path

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes
from qlora_tui.memory import cheapest_changes, estimate
from qlora_tui.memory.budget import local_budget
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import events_backwards
from qlora_tui.runs.events import PREPARING_PHASES, Phase, PhaseChanged, Queued, Started

_CGROUPS = Path("/proc/self/cgroup")
_HIERARCHIES = Path("/sys/fs/cgroup")
_VMSTAT = Path("/proc/vmstat")
_MIN_SAVING = 0.1
"""Minimum share by which a recipe that was estimated to fit, and did not, must shrink."""


def last_phase(run: RunDir) -> Phase | None:
    """Return the phase that the last attempt at a run was in; None before its first."""
    for event in events_backwards(run.events_path):
        if isinstance(event, PhaseChanged):
            return event.phase
        if isinstance(event, Started | Queued):
            break
    return None


def describe_fix(recipe: Recipe | None, phase: Phase | None) -> str:
    """Return what helps after memory ran out in this phase, in a sentence."""
    if phase == "tokenizing":
        return "Close other programs, or train on less data: the tokens of all samples are in host memory."
    if phase is not None and phase in PREPARING_PHASES:
        return _fix_for_model(recipe)
    settings = (
        "Lower the micro-batch size (training.micro_batch_size), turn on gradient checkpointing "
        "(training.gradient_checkpointing), or lower the sequence length (data.max_length)."
    )
    return (recipe and suggest_settings(recipe)) or settings


def _fix_for_model(recipe: Recipe | None) -> str:
    """What helps where the model itself does not fit; a smaller micro-batch does not."""
    choices = ["Close other programs that use this memory"]
    if recipe is not None and recipe.quantization.method in ("int8", "none"):
        choices.append("set the quantization method (quantization.method) to nf4")
    elif recipe is not None and not recipe.quantization.double_quantization:
        choices.append("turn on double quantization (quantization.double_quantization)")
    if recipe is not None and not recipe.lora.use_dora and local_budget().device.kind == "cuda":
        choices.append("stream layers of it from host memory (quantization.streamed_layers)")
    return f"{', '.join(choices)}, or choose a smaller model. A smaller micro-batch does not help."


def suggest_settings(recipe: Recipe) -> str:
    """Describe the cheapest change after which the recipe should fit here, in a sentence; empty if unknown.

    Trusts the failure rather than the estimate: the unchanged recipe does not fit.
    """
    try:
        architecture, budget = resolve_model(recipe.model.id).architecture, local_budget()
        whole = estimate(recipe, architecture, device=budget.device).process_bytes
        available = min(budget.bytes, round(whole * (1 - _MIN_SAVING)))
        changes = cheapest_changes(recipe, architecture, available, device=budget.device)
        if not changes:
            checkpointed = replace_setting(recipe, "training.gradient_checkpointing", "on")
            return _at_most(whole - estimate(checkpointed, architecture, device=budget.device).process_bytes)
    except UserError:
        return ""
    change = changes[0]
    cost = f" ({change.cost})" if change.cost else ""
    saved = format_bytes(whole - change.estimate.process_bytes)
    return f"The cheapest change that should fit: {change.label}{cost} saves {saved}."


def _at_most(saved_bytes: int) -> str:
    """Suggestion when nothing is known to be enough: what checkpointing would save, always worth trying."""
    if saved_bytes > 0:
        return f"Gradient checkpointing saves {format_bytes(saved_bytes)}, which may not be enough."
    return "No change of settings is enough: use a smaller model or more memory."


def host_oom_kills() -> int:
    """Number of processes killed by the kernel's out-of-memory killer since boot; 0 if unknown.

    Counts this process's control group if the kernel counts by group (kills elsewhere are no evidence), else
    the whole machine. Sources: ``memory.events`` of cgroup v2, ``memory.oom_control`` of v1,
    ``/proc/vmstat``.
    """
    for counter in (*_group_counters(), _VMSTAT):
        try:
            match = re.search(r"^oom_kill (\d+)$", counter.read_text(), re.MULTILINE)
        except OSError:
            continue
        if match:
            return int(match[1])
    return 0


def _group_counters() -> list[Path]:
    """Files in which this process's control group counts such kills."""
    try:
        lines = _CGROUPS.read_text().splitlines()
    except OSError:
        return []
    counters = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            counters.append(_HIERARCHIES / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            counters.append(_HIERARCHIES / "memory" / path.lstrip("/") / "memory.oom_control")
    return counters
