"""A run that memory ran out for: what killed it, and the cheapest change that would fit."""

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

_CGROUPS = Path("/proc/self/cgroup")
_HIERARCHIES = Path("/sys/fs/cgroup")
_VMSTAT = Path("/proc/vmstat")
_LEAST_SAVING = 0.1
"""What was estimated to fit and did not must shrink by this share at least."""


def suggest_settings(recipe: Recipe) -> str:
    """The cheapest change after which the recipe should fit here, as a sentence; empty where it is not known.

    Takes the word of the failure, not of the estimate: the recipe as it stands does not fit.
    """
    try:
        architecture, room = resolve_model(recipe.model.id).architecture, local_budget()
        whole = estimate(recipe, architecture, device=room.device).process_bytes
        available = min(room.bytes, round(whole * (1 - _LEAST_SAVING)))
        changes = cheapest_changes(recipe, architecture, available, device=room.device)
        if not changes:
            lean = replace_setting(recipe, "training.gradient_checkpointing", True)
            return _at_most(whole - estimate(lean, architecture, device=room.device).process_bytes)
    except UserError:
        return ""
    change = changes[0]
    cost = f" ({change.cost})" if change.cost else ""
    saved = format_bytes(whole - change.estimate.process_bytes)
    return f"The cheapest change that should fit: {change.label}{cost} saves {saved}."


def _at_most(saved_bytes: int) -> str:
    """Where nothing is known to be enough: what checkpointing would save, which is tried in any case."""
    if saved_bytes > 0:
        return f"Gradient checkpointing saves {format_bytes(saved_bytes)}, which may not be enough."
    return "No change of settings is enough: use a smaller model or more memory."


def host_oom_kills() -> int:
    """Processes that the kernel's out-of-memory killer has ended since boot; 0 where it does not say.

    Of this process's control group where the kernel counts by group (what others lost there is no evidence),
    else of the whole machine. Sources: ``memory.events`` of cgroup v2, ``memory.oom_control`` of v1,
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
    """Where this process's control group counts such kills."""
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
