"""``estimate``: itemized memory of a recipe, comparison of NF4 with int8 and 16-bit, and what fits."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import msgspec

from qlora_tui.catalog.architecture_types import Architecture, context_length_warning
from qlora_tui.catalog.local_models import (
    ModelNotFoundError,
    describe_model,
    fetch_architecture,
    is_fetchable,
    list_local_models,
    load_architecture,
    load_model_config,
)
from qlora_tui.cli.subcommand import (
    CommandResult,
    Subcommand,
    add_gpu_gib_argument,
    add_recipe_arguments,
    format_table,
    note_description,
    recipe_from_args,
)
from qlora_tui.data.sources import is_hub_dataset, open_source
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.formatting import GIB, format_bytes, format_gib, join_words
from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.gpu.visible_devices import choose_gpu
from qlora_tui.memory.budget import local_budget
from qlora_tui.memory.estimate import (
    PRECISIONS,
    Estimate,
    check_fit,
    closed_form,
    compare,
    precision_of,
    with_precision,
)
from qlora_tui.memory.execution import Device, trainer_execution
from qlora_tui.memory.explain import describe_choice, describe_speedup
from qlora_tui.memory.levels import Conversion
from qlora_tui.memory.quality import Quality, describe_quality, measure_in_child
from qlora_tui.memory.recording import StepTrace
from qlora_tui.memory.solver import cheapest_changes, largest_model_size, largest_settings, minimum_bytes
from qlora_tui.memory.step_choice import choose_step, describe_host_memory
from qlora_tui.memory.traces import known_traces
from qlora_tui.recipe.schema import Recipe
from qlora_tui.worker import Progress

_LARGEST_ITEMS = 12
_MODELS_NAMED = 5


def run(args: argparse.Namespace) -> CommandResult:
    """Estimate the memory of the recipe that the options describe.

    The exit code is 0 even if the recipe does not fit.
    """
    recipe = recipe_from_args(args)
    if not recipe.model.id:
        local = [model.id for model in list_local_models() if model.refusal is None]
        raise UserError(
            "No model",
            what="An estimate needs a model.",
            why=f"On this machine: {', '.join(local[:_MODELS_NAMED])}." if local else "",
            fix="Add --model with a Hub id, a folder (a config.json is enough) or a GGUF file.",
            exit_code=EXIT_USAGE,
        )
    for source in recipe.data.sources:
        if not is_hub_dataset(source.path):
            open_source(source, recipe.data.preferences)
    architecture = _architecture(recipe.model.id, recipe.model.revision)
    if args.gpu_gib is None:
        _require_chosen_gpu()
    budget = local_budget(None if args.gpu_gib is None else round(args.gpu_gib * GIB))
    if args.exact:
        _trace_steps(recipe, architecture, budget.device)
        budget = budget.with_traces(known_traces())
    data = as_json(recipe, architecture, budget.bytes, budget.device)
    compared = compare(recipe, architecture, device=budget.device)
    # If a GPU is given only by its size, its name is that size.
    compared_with = budget.name if args.gpu_gib else f"{budget.name} ({format_gib(budget.bytes)} GiB)"
    lines = [f"{recipe.model.id} against {compared_with}", ""]
    rows = []
    for precision in PRECISIONS:
        estimate = compared[precision]
        verdict = check_fit(estimate, budget.bytes)
        band = f"{format_gib(verdict.low_bytes)} to {format_gib(verdict.high_bytes)}"
        form = ["exact" if estimate.traced else "instant"] if args.exact else []
        rows.append([precision, f"{format_gib(estimate.total_bytes)} GiB", band, verdict.word, *form])
    headings = ["precision", "peak", "range", "verdict", *(["estimate"] if args.exact else [])]
    lines += [format_table(rows, headings), ""]
    own = precision_of(recipe)
    estimate = compared[own]
    if estimate.correction_words:
        lines += [f"{own} on this machine: {estimate.correction_words}", ""]
    largest = sorted(estimate.items, key=lambda item: -item.bytes)[:_LARGEST_ITEMS]
    lines.append(
        format_table(
            [[i.label, format_bytes(i.bytes), i.explanation] for i in largest],
            [f"{own} (the recipe's)", "", ""],
        )
    )
    if data["host_memory"]:
        lines += ["", data["host_memory"]]
    if data["trace"]:
        lines += ["", _trace_table(data["trace"])]
    # Only GGUF files need a conversion, and looking for one loads tokenizers.
    conversion = _conversion(recipe.model.id)
    if conversion is not None:
        on_cpu = budget.device.kind == "cpu"
        lines += ["", conversion.words(estimate.process_bytes if on_cpu else None)]
    data["conversion"] = conversion and {"file": conversion.file, "peak_bytes": conversion.peak_bytes}
    lines += ["", *_what_fits(data["what_fits"], is_marked=args.exact)]
    if (step := data["step"]) and step["description"]:
        total, faster = format_gib(step["total_bytes"]), describe_speedup(step["speedup"])
        free = format_gib(step["least_free_bytes"])
        lines.append(f"with {free} GiB free: takes {total} GiB, about {faster}: {step['description']}")
    for change in data["cheapest_changes"]:
        cost = f"; {change['cost']}" if change["cost"] else ""
        cost += "; instant estimate" if args.exact and not change["traced"] else ""
        lines.append(
            f"cheapest change that fits: {change['label']} ({format_gib(change['total_bytes'])} GiB, "
            f"{change['verdict']}{cost})"
        )
    if data["least_bytes"]:
        lines.append(
            "nothing fits: even with every change that saves memory, it takes "
            f"{format_gib(data['least_bytes'])} "
            "GiB. Choose a smaller model or a larger GPU."
        )
    lines += [f"note: {note}" for note in estimate.notes]
    is_clear = check_fit(estimate, budget.bytes).word in ("fits", "does not fit")
    if not args.exact and not (estimate.exact and is_clear):
        lines.append(
            "note: --exact narrows the range: in a few seconds, it runs one step of the model without its "
            "weights"
        )
    lines += [f"warning: {warning}" for warning in data["warnings"]]
    quality = _measured_quality(recipe) if args.quality else None
    data["quality"] = quality and msgspec.to_builtins(quality)
    if quality is not None:
        lines += ["", *describe_quality(quality)]
    return CommandResult(
        data={"model": recipe.model.id, "against": budget.name} | data, text="\n".join(lines)
    )


def _measured_quality(recipe: Recipe) -> Quality:
    """Measure how the recipe's quantization changes predictions for rows of its data, and print progress.

    Raises UserError.
    """
    shown = ""

    def show(progress: Progress) -> None:
        nonlocal shown
        tenths = 10 * progress.done // progress.total if progress.total else 0
        line = f"{progress.text} {tenths * 10}%" if progress.total else progress.text
        if line != shown:
            print(line, file=sys.stderr)
            shown = line

    return measure_in_child(recipe, on_progress=show)


def _require_chosen_gpu() -> None:
    """Raise GpuUnavailableError if the GPU that the user chose is missing, or the choice cannot be read."""
    try:
        choose_gpu()
    except GpuUnavailableError as error:
        if error.reason in (GpuUnavailableReason.NOT_PRESENT, GpuUnavailableReason.SETTING):
            raise


def _architecture(model_id: str, revision: str) -> Architecture:
    """Load the architecture of a local model, or fetch it from the Hub. Raises UserError."""
    try:
        architecture = load_architecture(model_id)
    except ModelNotFoundError:
        if not is_fetchable(model_id):
            raise
        print(f"fetching config.json of {model_id} from the Hub", file=sys.stderr)
        architecture = fetch_architecture(model_id, revision)
    note_description(architecture)
    return describe_model(model_id) if architecture.is_outline else architecture


def _conversion(model_id: str) -> Conversion | None:
    if not model_id.endswith(".gguf"):
        return None
    from qlora_tui.training.gguf_conversion import pending_conversion

    return pending_conversion(model_id)


def _what_fits(largest: dict[str, Any], *, is_marked: bool) -> list[str]:
    """Return a line with the largest values that fit, or an empty list if none fits.

    With ``is_marked``, the line says that it is an instant estimate.
    """
    names = {"sequence_length": "sequence length", "micro_batch": "micro-batch", "rank": "rank"}
    limits = ", ".join(f"{name} {largest[key]:,}" for key, name in names.items() if largest[key])
    form = " (instant estimate)" if is_marked else ""
    return [f"largest values that fit, changing one at a time{form}: {limits}"] if limits else []


TRACE_LABELS = {
    "frozen": "Frozen weights",
    "adapter": "LoRA weights",
    "gradients": "Gradients",
    "step": "Peak of the step, without weights and LoRA",
}


def _trace_steps(recipe: Recipe, architecture: Architecture, device: Device) -> None:
    """Trace the recipe's step in every precision in which this is possible.

    Raises UserError if it is impossible in the precision of the recipe.
    """
    from qlora_tui.runs.exact_memory import trace_all

    config, own = load_model_config(recipe.model.id), precision_of(recipe)
    for precision in (own, *(each for each in PRECISIONS if each != own)):
        print(f"tracing a step in {precision}", file=sys.stderr)
        one = with_precision(recipe, precision) if precision != own else recipe
        try:
            trace_all(config, [one], architecture, device)
        except UserError:
            if precision == own:
                raise


def _trace_table(trace: dict[str, Any]) -> str:
    rows = [
        [TRACE_LABELS[key], format_bytes(both["traced"]), format_bytes(both["closed_form"])]
        for key, both in trace["items"].items()
    ]
    table = format_table(rows, [f"{trace['precision']}, one step", "exact", "instant"])
    return f"{table}\n{trace['how']}"


def as_json(
    recipe: Recipe, architecture: Architecture, available_bytes: int, device: Device
) -> dict[str, Any]:
    """Return ``{"precisions": {"nf4": …, "int8": …, "fp16": …}, "what_fits": …, "cheapest_changes": …}``.

    There are further keys. ``least_bytes`` is None if the recipe or a change fits; otherwise it is the memory
    that the recipe takes with every change that saves memory.
    """
    compared = compare(recipe, architecture, device=device)
    result = compared[precision_of(recipe)]
    largest = largest_settings(recipe, architecture, available_bytes, device=device)
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
    fits = bool(changes) or check_fit(result, available_bytes).fits_even_if_tight
    own = device.traces.find(recipe, architecture, result.execution)
    choice = choose_step(recipe, architecture, available_bytes, device=device)
    too_long = context_length_warning(recipe.data.max_length, architecture)
    return {
        "available_bytes": available_bytes,
        "precisions": {name: _one_as_json(result, available_bytes) for name, result in compared.items()},
        "trace": own and _trace_as_json(own, result, recipe, architecture, device),
        "what_fits": {
            "sequence_length": largest.sequence_length,
            "micro_batch": largest.micro_batch,
            "rank": largest.rank,
            "model_class": largest_model_size(recipe, available_bytes, device=device),
        },
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
        "host_memory": describe_host_memory(recipe, architecture, device),
        "cheapest_changes": changes,
        "least_bytes": None if fits else minimum_bytes(recipe, architecture, device=device),
        "warnings": [] if too_long is None else [f"{too_long.what} {too_long.why} {too_long.fix}"],
    }


def _trace_as_json(
    traced: StepTrace,
    result: Estimate,
    recipe: Recipe,
    architecture: Architecture,
    device: Device,
) -> dict[str, Any]:
    """Return the bytes of each item in the trace and in the closed form, and whether ``result`` is exact."""
    closed = closed_form(recipe, architecture, trainer_execution(recipe, device, architecture))
    return {
        "precision": precision_of(recipe),
        "transformers": traced.transformers,
        "how": _describe_trace(traced),
        "exact": result.exact,
        "items": {
            key: {"traced": size, "closed_form": closed[key]} for key, size in traced.figures().items()
        },
    }


def _describe_trace(traced: StepTrace) -> str:
    """Return a phrase on the version of transformers that was traced, and on kernels that were replaced."""
    text = f"exact: traced with transformers {traced.transformers}"
    if traced.uncertain:
        text += (
            f", using transformers' own code in place of the kernels of {join_words(list(traced.uncertain))}"
        )
    return text


def _one_as_json(result: Estimate, available_bytes: int) -> dict[str, Any]:
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
        "verdict": check_fit(result, available_bytes).word,
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


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_gpu_gib_argument(parser, default=argparse.SUPPRESS)
    parser.add_argument(
        "--quality",
        action="store_true",
        help="also measure on rows of the data how much quantization changes the model's predictions, "
        "one layer in memory at a time; takes minutes",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="run one step of the model without its weights in each precision, for exact numbers; takes "
        "some seconds the first time",
    )


SUBCOMMANDS = {"estimate": Subcommand(run, _arguments, uses_gpu=True, changes=())}
