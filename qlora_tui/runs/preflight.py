"""Checks before a launch, with the same messages in ``train`` and on the Train screen.

The checks read the model's files and the data, which takes a few seconds at most. If only an exact memory
estimate can show whether the run fits, they wait for it, by default up to :data:`EXACT_WITHIN_S`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import msgspec

from qlora_tui import paths
from qlora_tui.catalog.adapters import require_fit, trained_on
from qlora_tui.catalog.architecture_types import context_length_warning
from qlora_tui.catalog.local_models import ModelFiles, load_model_config, resolve_model, training_refusal
from qlora_tui.catalog.model_validation import UNUSABLE_TOKENIZER
from qlora_tui.catalog.optional_kernels import describe_missing, missing_kernels
from qlora_tui.data.trainable_tokens import check_tokens
from qlora_tui.errors import UsageError, UserError
from qlora_tui.formatting import (
    capitalize,
    format_count,
    format_gib,
    format_path,
    format_rate,
    short_model_name,
)
from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.metrics import GpuDevice
from qlora_tui.gpu.nvml import Nvml
from qlora_tui.installation import install_command
from qlora_tui.memory import Estimate, cheapest_changes, check_fit, choose_step, estimate
from qlora_tui.memory.budget import budget_for
from qlora_tui.memory.explain import describe_choice, describe_speedup, fit_texts
from qlora_tui.memory.traces import known_traces, remember
from qlora_tui.memory.weights import require_4_bit_experts
from qlora_tui.recipe.conflicts import find_conflicts
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Lora, Recipe
from qlora_tui.recipe.targets import SKIP, match_modules, resolve_targets
from qlora_tui.recipe.training_settings import Training
from qlora_tui.remote.calls import at_box
from qlora_tui.runs.actions import initial_adapter, recipe_of_adapter
from qlora_tui.runs.data_checks import check_data
from qlora_tui.runs.devices import RunDevice, is_free, run_on, wanted_devices
from qlora_tui.runs.doctor import (
    Check,
    CheckKind,
    Machine,
    check_disk,
    check_gpu,
    check_gpus,
    check_host_memory,
    check_queue,
)
from qlora_tui.runs.exact_memory import trace_soon
from qlora_tui.runs.expected_time import Forecast, forecast
from qlora_tui.runs.suggested_fix import SuggestedFix

TRACKER_NAMES = {
    "tensorboard": "TensorBoard",
    "wandb": "Weights & Biases",
    "trackio": "Trackio",
    "mlflow": "MLflow",
}
"""Display name of each tracker that ``training.report_to`` offers, by the name of its package."""
OF_MACHINE = frozenset(
    (
        CheckKind.TIME,
        CheckKind.MEMORY,
        CheckKind.HOST_MEMORY,
        CheckKind.GPU,
        CheckKind.QUEUE,
        CheckKind.KERNELS,
    )
)
"""Checks that concern the machine on which a run trains, not its model, data or settings."""
_HIGH_RATE = 10
"""Multiple of the default learning rate above which LoRA training is seldom stable."""
_SPARE_BYTES = 1 << 30
EXACT_WITHIN_S = 20.0
"""Seconds for which a launch waits for an exact estimate, if the instant one is too close to the limit."""
_UNKNOWN_MEMORY = Check(
    CheckKind.MEMORY,
    "warning",
    "The GPU's memory is unknown, so it is not clear whether the run fits.",
    "Enter the memory size with `qlora-tui estimate --gpu-gib`, or under “GPU memory to assume” in the "
    "settings.",
)


@at_box
def preflight(
    recipe: Recipe,
    machine: Machine,
    exact_within_s: float = EXACT_WITHIN_S,
    expected: Forecast | None = None,
) -> tuple[Check, ...]:
    """Run every check of a recipe on a machine, in the order in which problems should be fixed.

    Never raises: if a run cannot start, a check has a ``problem``.

    Args:
        recipe: The recipe.
        machine: The machine that would train.
        exact_within_s: How long to wait for an exact memory estimate if the instant estimate cannot decide.
        expected: Expected length of the run, if the caller has it.
    """
    model, files = _model(recipe)
    several, recipe, machine = _devices(recipe, machine)
    checks = [model, *check_data(recipe, files), *_settings(recipe), *several]
    estimated = None
    if files is not None:
        checks += [*_stored_experts(recipe, files), *_lora(recipe, files), *_length(recipe, files)]
        memory, estimated = _memory(recipe, files, machine, exact_within_s)
        checks.append(_UNKNOWN_MEMORY if machine.trains_on_unknown_gpu else memory)
        checks += [*_kernels(files, machine), *_time(expected or forecast(recipe, machine, files))]
        # An assumed GPU belongs to another machine, whose host memory is unknown.
        if estimated is not None and estimated.host_bytes and not machine.budget.is_assumed:
            checks.append(check_host_memory(estimated.host_bytes))
    return (
        *checks,
        check_gpu(machine, estimated.total_bytes if estimated else 0),
        check_disk(paths.runs_dir(), _checkpoint_bytes(recipe, estimated), variable="XDG_STATE_HOME"),
        check_queue(machine),
    )


def errors(checks: tuple[Check, ...]) -> tuple[Check, ...]:
    """Return the checks that say that the run would fail."""
    return tuple(check for check in checks if check.outcome == "error")


def with_count(checks: tuple[Check, ...], problem: UserError | None) -> tuple[Check, ...]:
    """Add the error that prevents counting the samples, unless the checks already contain an error.

    The added error replaces the passed check of its kind.
    """
    if problem is None or errors(checks):
        return checks
    # Without a tokenizer, no samples can be counted, whatever the data is.
    kind = CheckKind.MODEL if problem.code == UNUSABLE_TOKENIZER else CheckKind.DATA
    return (
        Check.blocked(kind, problem),
        *(check for check in checks if (check.kind, check.outcome) != (kind, "ok")),
    )


def missing_tracker(report_to: str) -> UserError | None:
    """Return the error for a tracker whose package is not installed; None if nothing is missing."""
    if report_to == "none" or find_spec(report_to) is not None:
        return None
    return UserError(
        f"{TRACKER_NAMES[report_to]} is not installed",
        what=f'Report to (training.report_to) is "{report_to}", but its package is not installed.',
        fix=f'Install it with `{install_command(report_to)}`, or set training.report_to = "none".',
    )


def _model(recipe: Recipe) -> tuple[Check, ModelFiles | None]:
    if not recipe.model.id:
        fix = "Choose a model on the Model screen, or pass --model."
        problem = UsageError("No model", what="No model selected.", fix=fix)
        return Check.blocked(CheckKind.MODEL, problem), None
    try:
        files = resolve_model(recipe.model.id)
    except UserError as problem:
        return Check.blocked(CheckKind.MODEL, problem), None
    if (refusal := training_refusal(recipe.model.id)) is not None:
        return Check.blocked(CheckKind.MODEL, refusal), files
    weights = "a GGUF file, converted on first use" if files.gguf_file else f"in {format_path(files.folder)}"
    text = f"{format_count(files.architecture.total_params)} parameters, {weights}."
    return Check(CheckKind.MODEL, "ok", text), files


def _settings(recipe: Recipe) -> list[Check]:
    missing = missing_tracker(recipe.training.report_to)
    return [
        *([Check.blocked(CheckKind.SETTINGS, missing)] if missing else []),
        *_learning_rate(recipe),
        *_reference_point(recipe),
        *(
            Check(CheckKind.SETTINGS, "error", f"{c.what}.", f"{capitalize(c.fix)}.")
            for c in find_conflicts(recipe)
        ),
    ]


def _learning_rate(recipe: Recipe) -> list[Check]:
    """Warn if the learning rate is much higher than usual."""
    rate, usual = recipe.training.learning_rate, Training().learning_rate
    if rate <= usual * _HIGH_RATE:
        return []
    times = f"{rate / usual:,.0f} times the usual {format_rate(usual)}"
    text = f"Learning rate is {format_rate(rate)}, {times}: the loss may diverge."
    fix = "Lower Learning rate (training.learning_rate)."
    lower = SuggestedFix(
        f"set Learning rate to {format_rate(usual)}", changes={"training.learning_rate": usual}
    )
    return [Check(CheckKind.SETTINGS, "warning", text, fix, suggested_fix=lower)]


def _reference_point(recipe: Recipe) -> list[Check]:
    """Warn if a step of KTO has a single answer, so that none is left for the reference point."""
    traits = recipe.preference_traits
    if traits is None or not traits.rates_answers or recipe.data.packing or recipe.effective_batch > 1:
        return []
    text = (
        f"Each step has only one answer, but {traits.label} estimates its reference point from the other "
        f"answers of a step."
    )
    fix = "Raise Gradient accumulation (training.gradient_accumulation) to 8 or more."
    more = SuggestedFix("set Gradient accumulation to 8", changes={"training.gradient_accumulation": 8})
    return [Check(CheckKind.SETTINGS, "warning", text, fix, suggested_fix=more)]


def _devices(recipe: Recipe, machine: Machine) -> tuple[list[Check], Recipe, Machine]:
    """Check the GPUs of a run if there are several; return recipe and machine for the other checks."""
    try:
        gpus, recipe, machine = gpus_of_run(recipe, machine)
    except UserError as problem:
        return [Check.blocked(CheckKind.GPU, problem)], recipe, machine
    return (_checks_of_gpus(recipe, gpus) if len(gpus) > 1 else []), recipe, machine


def gpus_of_run(recipe: Recipe, machine: Machine) -> tuple[Sequence[GpuDevice], Recipe, Machine]:
    """Return the GPUs that a run would get if the machine has several, with recipe and machine for planning.

    If the machine has only one GPU or none, no GPUs are returned. The returned recipe's ``training.gpus`` is
    the number of GPUs. The returned machine has the GPU with the least memory among them, because each GPU
    holds the whole model and the same micro-batch.

    Raises:
        UserError: The machine has fewer GPUs than the recipe requests.
    """
    if recipe.training.gpus == 1 and not machine.gpu_choice:
        return (), recipe, machine
    wanted = wanted_devices(recipe, os.environ)
    recipe = replace_setting(recipe, "training.gpus", wanted.processes)
    if not wanted.gpus:
        return (), recipe, machine
    free = [gpu for gpu in wanted.gpus if is_free(RunDevice.of_gpu(gpu).key)]
    count, waits = wanted.count, len(free) < wanted.count
    gpus = (wanted.gpus if waits else free)[:count]
    smallest = min(gpus, key=lambda gpu: gpu.usable_bytes or 0)
    if smallest != machine.gpu:
        used = None
        with suppress(GpuUnavailableError), Nvml() as driver:
            used = driver.read(smallest.index).memory_used_bytes
        budget = machine.budget if machine.budget.is_assumed else budget_for(smallest)
        why = f"the smallest of {count}" if count > 1 else "the next free one"
        choice = f"GPU {smallest.index}, {why}"
        machine = replace(machine, gpu=smallest, budget=budget, used_bytes=used, gpu_choice=choice)
    keys = (RunDevice.of_gpu(gpu).key for gpu in gpus)
    machine = replace(machine, active=next(filter(None, map(run_on, keys)), "") if waits else "")
    return gpus, recipe, machine


def _checks_of_gpus(recipe: Recipe, gpus: Sequence[GpuDevice]) -> list[Check]:
    """Report the GPUs of a run on several GPUs, and micro-batches that leave some of them idle."""
    count, checks = len(gpus), [check_gpus(gpus)]
    if (shares := recipe.training.gradient_accumulation) % count:
        text = f"{shares} micro-batches per step leave some of the {count} GPUs idle."
        fix = f"Set Gradient accumulation (training.gradient_accumulation) to a multiple of {count}."
        more = -(-shares // count) * count
        rounded = SuggestedFix(
            f"set Gradient accumulation to {more}", changes={"training.gradient_accumulation": more}
        )
        checks.append(Check(CheckKind.SETTINGS, "warning", text, fix, suggested_fix=rounded))
    return checks


def _stored_experts(recipe: Recipe, files: ModelFiles) -> list[Check]:
    """Report settings with which the model's expert weights cannot be read."""
    try:
        require_4_bit_experts(recipe.quantization, files.architecture)
    except UserError as problem:
        return [Check.blocked(CheckKind.SETTINGS, problem)]
    return []


def _lora(recipe: Recipe, files: ModelFiles) -> list[Check]:
    """Report patterns that match no module, and trainable tokens missing from the tokenizer. Check the
    initial adapter, if any.
    """
    try:
        resolve_targets(recipe.lora, files.architecture.targets)
        match_modules(recipe.quantization.skip, files.architecture.modules, SKIP)
        if files.gguf_file is None:
            check_tokens(recipe.lora.trainable_tokens, files.folder)
        if recipe.lora.init_from:
            return _initial_adapter(recipe, files)
    except UserError as problem:
        return [Check.blocked(CheckKind.LORA, problem)]
    return []


def _initial_adapter(recipe: Recipe, files: ModelFiles) -> list[Check]:
    """Report an initial adapter that differs from the recipe, or was trained on another model."""
    folder = initial_adapter(recipe.lora.init_from)
    try:
        require_fit(folder, recipe.lora, files.architecture)
    except UserError as problem:
        return [Check.blocked(CheckKind.LORA, problem, _its_settings(recipe.lora, folder))]
    base = trained_on(folder)
    if not base or short_model_name(base) in (short_model_name(recipe.model.id), files.folder.name):
        return [Check(CheckKind.LORA, "ok", f"Starts from the adapter in {format_path(folder)}.")]
    text = f"The adapter to start from was trained on {base}, which may be a different model."
    fix = "Choose that model, or clear “Start from” (lora.init_from)."
    return [Check(CheckKind.LORA, "warning", text, fix)]


def _its_settings(lora: Lora, folder: Path) -> SuggestedFix | None:
    """Return a fix that copies the initial adapter's LoRA settings to the recipe.

    None if the adapter's folder has no recipe, or its settings do not differ.
    """
    theirs = recipe_of_adapter(folder)
    if theirs is None:
        return None
    changes = {
        f"lora.{key}": value
        for key, value in msgspec.structs.asdict(theirs.lora).items()
        if key not in ("init_from", "dropout") and value != getattr(lora, key)
    }
    return SuggestedFix("use the adapter's LoRA settings", changes=changes) if changes else None


def _length(recipe: Recipe, files: ModelFiles) -> list[Check]:
    warning = context_length_warning(recipe.data.max_length, files.architecture)
    if warning is None:
        return []
    return [Check(CheckKind.LENGTH, "warning", f"{warning.what} {warning.why}", warning.fix)]


def _memory(
    recipe: Recipe, files: ModelFiles, machine: Machine, exact_within_s: float
) -> tuple[Check, Estimate | None]:
    budget = machine.budget
    try:
        estimated = estimate(recipe, files.architecture, device=budget.device)
    except UserError as problem:
        return Check(CheckKind.MEMORY, "error", problem.what, problem.fix), None
    verdict = check_fit(estimated, budget.bytes)
    # Otherwise the instant form is too close to the limit or too uncertain to decide.
    is_decided = verdict.word == "does not fit" or (verdict.word == "fits" and estimated.exact)
    waits = 0.0 if is_decided else exact_within_s
    config = load_model_config(recipe.model.id)
    traced = trace_soon(config, recipe, estimated.execution, waits)
    if traced is not None:
        remember(recipe, files.architecture, estimated.execution, traced)
        budget = budget.with_traces(known_traces())
        estimated = estimate(recipe, files.architecture, device=budget.device)
        verdict = check_fit(estimated, budget.bytes)
    # Memory that an active run holds will be free again.
    now = None if machine.active or budget.is_assumed else machine.free_bytes
    free_bytes = budget.bytes if now is None else now
    choice = choose_step(recipe, files.architecture, free_bytes, device=budget.device)
    verdict = replace(verdict, used_bytes=choice.estimate.process_bytes)
    text = f"{fit_texts(verdict, budget.name)[0]}."
    if chosen := describe_choice(choice):
        text += f" Free memory makes it {describe_speedup(choice.speedup)}: {chosen}."
    match verdict.word:
        case "fits":
            check = Check(CheckKind.MEMORY, "ok", text, verdict=verdict)
        case "does not fit":
            fix = "See the Memory screen for the cheapest fix, or run `qlora-tui estimate`."
            if machine.gpu_choice:
                fix += (
                    " Each GPU of a run on several GPUs holds the whole model. A model that does not "
                    "fit on one GPU needs streamed layers (quantization.streamed_layers)."
                )
            changes = cheapest_changes(recipe, files.architecture, budget.bytes, device=budget.device)
            cheapest = SuggestedFix(changes[0].label, changes=changes[0].settings) if changes else None
            check = Check(CheckKind.MEMORY, "error", text, fix, suggested_fix=cheapest, verdict=verdict)
        case _:
            low, high = format_gib(verdict.low_bytes), format_gib(verdict.high_bytes)
            fix = (
                f"A step may take {low} to {high} GiB. The Memory screen and `qlora-tui estimate` name the "
                f"cheapest change that makes the step fit with certainty."
            )
            check = Check(CheckKind.MEMORY, "warning", text, fix, verdict=verdict)
    return check, estimated


def _kernels(files: ModelFiles, machine: Machine) -> list[Check]:
    """Report kernel packages for this model that are not installed; empty without a GPU."""
    missing = missing_kernels(files.architecture.model_type) if machine.gpu else ()
    if not missing:
        return []
    text, fix = describe_missing(missing)
    return [Check(CheckKind.KERNELS, "warning", text, fix)]


def _time(expected: Forecast | None) -> list[Check]:
    """Report how long the steps take, and the source of this figure."""
    if expected is None:
        return []
    if expected.time is None:
        text = "Unknown until the first steps: nothing has been trained on this machine yet."
        return [Check(CheckKind.TIME, "note", text)]
    text = f"{capitalize(expected.duration)} of training, {expected.time.source}."
    return [Check(CheckKind.TIME, "ok", text)]


def _checkpoint_bytes(recipe: Recipe, estimated: Estimate | None) -> int:
    """Return the disk space that a run may take. Checkpoints hold adapter and optimizer states."""
    one = estimated.bytes_of("adapter") + estimated.bytes_of("optimizer") if estimated else 0
    # Besides the checkpoints that are kept, there are the best one and the result.
    return one * (recipe.training.keep_checkpoints + 2) + _SPARE_BYTES
