"""After memory ran out: what the next attempt changes automatically, and what the user can change.

A retry computes the same training steps in less memory. First, fewer layers keep their activations if
``gradient_checkpointing`` is ``auto``, or more layers are streamed if some are. Then the micro-batch is
halved and accumulation doubled, which keeps the effective batch. At a micro-batch of one, gradient
checkpointing is turned on. If the model alone did not fit, none of this helps.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, structs

from qlora_tui.decoding import decode_json
from qlora_tui.errors import UsageError, UserError
from qlora_tui.formatting import format_bytes, pluralize
from qlora_tui.recipe.aliases import canonical_value
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.training_settings import Checkpointing, Training
from qlora_tui.runs import events
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventTail, append_event, events_backwards

_KEPT_DIVISOR = 4
"""A retry divides the number of layers that keep their activations by this. An estimate is rarely off by a
larger factor.
"""
_LAYER_COUNTS = frozenset({"kept_layers", "streamed_layers", "resident_layers"})
_CGROUPS = Path("/proc/self/cgroup")
_HIERARCHIES = Path("/sys/fs/cgroup")
_VMSTAT = Path("/proc/vmstat")
_MIN_SAVING = 0.1
"""Minimum share of a recipe's memory that a change must save if the recipe was estimated to fit but ran out
of memory.
"""


class RetryPlan(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Settings that an attempt overrides; None leaves a setting unchanged.

    The fields are named as in the recipe's ``[training]`` and in the ``started`` event, except for the
    numbers of layers.
    """

    micro_batch_size: int | None = None
    gradient_accumulation: int | None = None
    gradient_checkpointing: Checkpointing | None = None
    kept_layers: int | None = None
    """Maximum number of layers that keep their activations, if gradient checkpointing is ``auto``."""
    streamed_layers: int | None = None
    """Number of layers whose weights stay in host memory, if the recipe streams any."""
    resident_layers: int | None = None
    """Number of layers that are not streamed. A retry may stream them too."""

    @classmethod
    def from_settings(cls, settings: Training | events.Started) -> RetryPlan:
        """Return a plan with the micro-batch size, accumulation and gradient checkpointing of a recipe or an
        attempt. The numbers of layers are None.
        """
        checkpointing = canonical_value("training.gradient_checkpointing", settings.gradient_checkpointing)
        return cls(
            micro_batch_size=settings.micro_batch_size,
            gradient_accumulation=settings.gradient_accumulation,
            gradient_checkpointing=checkpointing,
        )

    def after(self, event: events.AnyEvent) -> RetryPlan:
        """Return the plan updated by an event. ``Started`` begins a new plan, which is empty if the event has
        no settings.
        """
        match event:
            case events.Started():
                return RetryPlan.from_settings(event) if event.micro_batch_size else RetryPlan()
            case events.StepChosen():
                rows, passes = event.micro_batch_size, event.gradient_accumulation
                return structs.replace(self, micro_batch_size=rows, gradient_accumulation=passes)
            case events.LayersKept():
                return structs.replace(self, kept_layers=event.kept_layers)
            case events.LayersStreamed():
                streamed = event.streamed_layers
                resident = event.layers - streamed
                return structs.replace(self, streamed_layers=streamed, resident_layers=resident)
            case _:
                return self

    def overrides(self) -> dict[str, Any]:
        """Return the settings of ``[training]`` that this plan overrides, by name."""
        return {
            name: value
            for name, value in structs.asdict(self).items()
            if value is not None and name not in _LAYER_COUNTS
        }

    def apply_to(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the plan's settings."""
        quantization = recipe.quantization
        if self.streamed_layers is not None:
            quantization = structs.replace(quantization, streamed_layers=self.streamed_layers)
        training = structs.replace(recipe.training, **self.overrides())
        if self.micro_batch_size is not None:
            training = structs.replace(training, auto_micro_batch=False)
        return structs.replace(recipe, quantization=quantization, training=training)

    def to_arguments(self) -> list[str]:
        """Return the option of ``python -m qlora_tui.training`` with the plan; empty without overrides."""
        return ["--plan", msgspec.json.encode(self).decode()] if self != RetryPlan() else []


_DECODER = msgspec.json.Decoder(RetryPlan)


def parse_plan(argument: str) -> RetryPlan:
    """Decode the value of ``--plan``. Raises UserError if it is not a plan in JSON."""
    try:
        return decode_json(argument.encode(errors="surrogateescape"), _DECODER)
    except msgspec.MsgspecError as error:
        raise UsageError(
            "Invalid --plan",
            what=f"{argument} cannot be decoded: {error}.",
            fix='Pass JSON such as {"micro_batch_size":1,"gradient_accumulation":8}, or omit --plan.',
        ) from None


def last_plan(run: RunDir) -> RetryPlan:
    """Return the plan that the last attempt used; an empty plan before the first attempt."""
    plan = RetryPlan()
    for event in EventTail(run.events_path).drain():
        plan = plan.after(event)
    return plan


def plan_resume(run: RunDir) -> RetryPlan:
    """Return the plan for resuming: the plan of the last attempt if memory ran out in any attempt; otherwise
    an empty plan, with which the recipe's settings apply.
    """
    drained = EventTail(run.events_path).drain()
    ran_out = any(isinstance(event, events.Failed) and event.kind == "out_of_memory" for event in drained)
    return last_plan(run) if ran_out else RetryPlan()


def next_plan(run: RunDir, ending: events.RunEnded) -> RetryPlan | None:
    """Return the plan of the next attempt after an ending; None if the run should not be retried."""
    if (
        not isinstance(ending, events.Failed)
        or ending.kind != "out_of_memory"
        or ending.phase in events.PREPARING_PHASES
    ):
        return None
    recipe = run.readable_recipe()
    return None if recipe is None else reduce_memory(recipe, last_plan(run))


def plan_retry(run: RunDir, ending: events.RunEnded) -> RetryPlan | None:
    """Plan the next attempt after an ending, and record it in the run's events."""
    plan = next_plan(run, ending)
    if plan is not None and isinstance(ending, events.Failed):
        append_event(
            run.events_path,
            events.Health(
                kind="out_of_memory",
                severity="warning",
                evidence=ending.what,
                remedy=f"Trying again with {describe_plan(plan)}; the effective batch stays the same.",
            ),
        )
    return plan


def reduce_memory(recipe: Recipe, used: RetryPlan) -> RetryPlan | None:
    """Return the next plan that needs less memory than ``used``, with the same effective batch; None if there
    is none.
    """
    now = structs.replace(
        RetryPlan.from_settings(used.apply_to(recipe).training),
        **{name: getattr(used, name) for name in _LAYER_COUNTS},
    )
    assert now.micro_batch_size is not None and now.gradient_accumulation is not None
    if now.gradient_checkpointing == "auto" and now.kept_layers:
        return structs.replace(now, kept_layers=now.kept_layers // _KEPT_DIVISOR)
    if now.streamed_layers and now.resident_layers:
        # Smaller micro-batches would need as many additional copies of the layers.
        more = -(-now.resident_layers // 2)
        return structs.replace(
            now, streamed_layers=now.streamed_layers + more, resident_layers=now.resident_layers - more
        )
    if now.micro_batch_size > 1:
        # An odd micro-batch cannot be halved exactly, so use one row at a time, which keeps the product.
        factor = 2 if now.micro_batch_size % 2 == 0 else now.micro_batch_size
        return structs.replace(
            now,
            micro_batch_size=now.micro_batch_size // factor,
            gradient_accumulation=now.gradient_accumulation * factor,
        )
    return structs.replace(now, gradient_checkpointing="on") if now.gradient_checkpointing == "off" else None


def describe_plan(plan: RetryPlan) -> str:
    """Describe the plan in words, for events and screens."""
    words = f"micro-batch {plan.micro_batch_size} × accumulation {plan.gradient_accumulation}"
    if plan.streamed_layers:
        words += f", streaming the weights of {pluralize(plan.streamed_layers, 'layer')}"
    if plan.gradient_checkpointing == "auto" and plan.kept_layers:
        return f"{words}, keeping the activations of {pluralize(plan.kept_layers, 'layer')}"
    return words + (" and gradient checkpointing" if plan.gradient_checkpointing != "off" else "")


def last_phase(run: RunDir) -> events.Phase | None:
    """Return the phase in which the last attempt of a run was; None before its first phase."""
    for event in events_backwards(run.events_path):
        if isinstance(event, events.PhaseChanged):
            return event.phase
        if isinstance(event, events.Started | events.Queued):
            break
    return None


def describe_fix(recipe: Recipe | None, phase: events.Phase | None) -> str:
    """Return what the user can do after memory ran out in ``phase``, in one or two sentences."""
    if phase == "tokenizing":
        return "Close other programs, or train on less data: the tokens of all samples are in host memory."
    if phase is not None and phase in events.PREPARING_PHASES:
        return _fix_for_model(recipe)
    settings = (
        "Lower the micro-batch size (training.micro_batch_size), turn on gradient checkpointing "
        "(training.gradient_checkpointing), or lower the sequence length (data.max_length)."
    )
    return (recipe and suggest_settings(recipe)) or settings


def _fix_for_model(recipe: Recipe | None) -> str:
    """Return what helps if the model itself does not fit. A smaller micro-batch does not help then."""
    from qlora_tui.memory.budget import local_budget  # not needed by a runner otherwise

    choices = ["Close other programs that use this memory"]
    if recipe is not None and recipe.quantization.method in ("int8", "none"):
        choices.append("set the quantization method (quantization.method) to nf4")
    elif recipe is not None and not recipe.quantization.double_quantization:
        choices.append("turn on double quantization (quantization.double_quantization)")
    if recipe is not None and not recipe.lora.use_dora and local_budget().device.kind == "cuda":
        choices.append("stream some of its layers from host memory (quantization.streamed_layers)")
    return f"{', '.join(choices)}, or choose a smaller model. A smaller micro-batch does not help."


def suggest_settings(recipe: Recipe) -> str:
    """Describe the cheapest change after which the recipe should fit, in a sentence; empty if unknown.

    If no change is known to be enough, the sentence says so. The recipe has run out of memory, so the change
    must save memory even if the recipe was estimated to fit.
    """
    from qlora_tui.catalog.local_models import resolve_model
    from qlora_tui.memory import cheapest_changes, estimate
    from qlora_tui.memory.budget import local_budget

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
    return f"The cheapest change that should be enough: {change.label}{cost} saves {saved}."


def _at_most(saved_bytes: int) -> str:
    """Return a sentence for a recipe for which no change is known to be enough.

    It says how much gradient checkpointing saves or, if ``saved_bytes`` is not positive, that no setting is
    enough.
    """
    if saved_bytes > 0:
        return f"Gradient checkpointing saves {format_bytes(saved_bytes)}, which may not be enough."
    return "No change of settings is enough: choose a smaller model or a machine with more memory."


def host_oom_kills() -> int:
    """Return the number of processes that the kernel's out-of-memory killer has ended since boot; 0 if
    unknown.

    If the kernel counts by control group, only this process's group is counted, because kills in other groups
    do not concern the trainer. Otherwise the whole machine is counted. Sources: ``memory.events`` of cgroup
    v2, ``memory.oom_control`` of v1, ``/proc/vmstat``.
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
    """Return the files in which the kernel counts the out-of-memory kills of this process's control group."""
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
