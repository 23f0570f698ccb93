"""Checks before a launch, with the same messages in ``train`` and the Train screen.

They read the model's files and the data, for a few seconds at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import msgspec
from msgspec.structs import replace

from qlora_tui import paths
from qlora_tui.catalog.adapter_fit import require_fit, trained_on
from qlora_tui.catalog.context_length import context_length_warning
from qlora_tui.catalog.local_models import ModelFiles, resolve_model
from qlora_tui.data.error_cache import Tokens, file_fingerprint, raise_cached_error, tokenizer_fingerprint
from qlora_tui.data.hub_dataset import local_files
from qlora_tui.data.preferences import (
    METHODS_FOR_PAIRS,
    NOTHING_COMPARED_TITLE,
    PAIRS_TITLE,
    RATED_TITLE,
)
from qlora_tui.data.problems import SKIP_BAD_ROWS, DataProblem
from qlora_tui.data.quick_check import FileSize, QuickCheckResult, quick_check
from qlora_tui.data.read import COLUMNAR, files_of, kind_of
from qlora_tui.data.sources import SourceFile, every_source, is_hub_dataset, sniff
from qlora_tui.data.token_lookup import check_tokens
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.formatting import (
    format_bytes,
    format_count,
    format_gib,
    format_path,
    pluralize,
    short_model_name,
)
from qlora_tui.memory import Estimate, cheapest_changes, check_fit, estimate, plan_kept_layers
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.four_bit import require_4_bit_experts
from qlora_tui.recipe.conflicts import find_conflicts
from qlora_tui.recipe.schema import Data, Lora, Recipe, Source, Training
from qlora_tui.recipe.targets import check_optimizer_of_experts, resolve_targets
from qlora_tui.recipe.toml import load, to_frozen_recipe
from qlora_tui.runs.initial_adapter import initial_adapter
from qlora_tui.runs.machine_checks import (
    Check,
    CheckKind,
    Machine,
    check_disk,
    check_gpu,
    check_host_memory,
    check_queue,
)
from qlora_tui.runs.step_limit import check_step_limit
from qlora_tui.runs.suggested_fix import SuggestedFix
from qlora_tui.runs.tracker_packages import missing_tracker

_HIGH_RATE = 10
"""Factor of the default learning rate above which LoRA training seldom stays stable."""
_SPARE_BYTES = 1 << 30


def preflight(recipe: Recipe, machine: Machine, *, read_columnar: bool) -> tuple[Check, ...]:
    """Run every check of a recipe on a machine, in the order of what to fix first.

    ``read_columnar``: whether this process may load the reader of Parquet and Arrow files. Never raises: a
    run that cannot start has a check with a ``problem``.
    """
    model, files = _model(recipe)
    checks = [model, *_data(recipe, files, read_columnar=read_columnar), *_settings(recipe)]
    estimated = None
    if files is not None:
        checks += [*_stored_experts(recipe, files), *_lora(recipe, files), *_length(recipe, files)]
        memory, estimated = _memory(recipe, files, machine.budget)
        checks.append(memory)
        # An assumed GPU is in another machine.
        if estimated is not None and estimated.host_bytes and not machine.budget.is_assumed:
            checks.append(check_host_memory(estimated.host_bytes))
    return (
        *checks,
        check_gpu(machine, estimated.total_bytes if estimated else 0),
        check_disk(paths.runs_dir(), _checkpoint_bytes(recipe, estimated), variable="XDG_STATE_HOME"),
        check_queue(machine),
    )


def errors(checks: tuple[Check, ...]) -> tuple[Check, ...]:
    """Return the checks for which the run would fail."""
    return tuple(check for check in checks if check.outcome == "error")


def _blocked(kind: CheckKind, problem: UserError, suggested_fix: SuggestedFix | None = None) -> Check:
    return Check(kind, "error", problem.what, problem.fix, problem, suggested_fix)


def _model(recipe: Recipe) -> tuple[Check, ModelFiles | None]:
    if not recipe.model.id:
        fix = "Choose one on the Model screen, or pass --model."
        problem = UserError("No model", what="No model selected.", fix=fix, exit_code=EXIT_USAGE)
        return _blocked(CheckKind.MODEL, problem), None
    try:
        files = resolve_model(recipe.model.id)
    except UserError as problem:
        return _blocked(CheckKind.MODEL, problem), None
    weights = "a GGUF file, converted on first use" if files.gguf_file else f"in {format_path(files.folder)}"
    text = f"{format_count(files.architecture.total_params)} parameters, {weights}."
    return Check(CheckKind.MODEL, "ok", text), files


def _data(recipe: Recipe, model_files: ModelFiles | None, *, read_columnar: bool) -> list[Check]:
    data = recipe.data
    if not data.sources:
        fix = "Choose a file on the Data screen, or pass --data."
        problem = UserError("No data", what="No data selected.", fix=fix, exit_code=EXIT_USAGE)
        return [_blocked(CheckKind.DATA, problem)]
    try:
        descriptions = _describe_sources(data, _token_fingerprint(recipe, model_files))
        result = _check_rows(_fingerprints(data), _reading_settings(data), read_columnar)
        if isinstance(result, UserError):
            raise result
    except UserError as problem:
        return [_blocked(CheckKind.DATA, problem, _data_fix(problem))]
    except OSError as error:
        return [_blocked(CheckKind.DATA, _unreadable(error))]
    checks = [_row_warning(warning) for warning in result.warnings]
    all_here = all(_local_files(source) is not None for source in every_source(data))
    complete = result.complete and all_here
    if not complete:
        later = "Rows not read yet are checked when the run starts."
        checks.append(Check(CheckKind.DATA, "note", f"{'; '.join(descriptions)}. {later}"))
    elif not checks:
        checks.append(_rows_used(result.sizes, len(data.sources), f"{'; '.join(descriptions)}."))
    return [*checks, *check_step_limit(recipe, result.sizes, complete=complete)]


def _data_fix(problem: UserError) -> SuggestedFix | None:
    """Return the change of a setting that makes the data usable, where there is one."""
    if SKIP_BAD_ROWS in problem.fix:
        return SuggestedFix("leave bad rows out", changes={"data.bad_rows": "skip"})
    if problem.title == PAIRS_TITLE and METHODS_FOR_PAIRS in problem.fix:
        return SuggestedFix("train on both answers with ORPO", changes={"data.preferences": "orpo"})
    if problem.title == RATED_TITLE:
        return SuggestedFix("train on all answers with KTO", changes={"data.preferences": "kto"})
    if problem.title == NOTHING_COMPARED_TITLE:
        return SuggestedFix("train on the answers as they are", changes={"data.preferences": "refuse"})
    return None


def _rows_used(sizes: Sequence[FileSize], sources: int, text: str) -> Check:
    """Say how many rows are trained on, where that is not all of them; ``text`` describes the sources."""
    trained = [size for size in sizes if size.source < sources]
    rows, used = sum(size.rows for size in trained), sum(size.samples for size in trained)
    if used == rows:
        return Check(CheckKind.DATA, "ok", text)
    fix = "See why on the Data screen, or with `qlora-tui data inspect`."
    return Check(CheckKind.DATA, "note", f"{text} About {used:,} of {pluralize(rows, 'row')} are used.", fix)


def data_error(data: Data) -> UserError | None:
    """Return why the data cannot be trained on, as far as its first rows and earlier inspections show."""
    try:
        _describe_sources(data, None)
    except UserError as problem:
        return problem
    except OSError as error:
        return _unreadable(error)
    return None


def _describe_sources(data: Data, tokens: Tokens | None) -> list[str]:
    """Describe each source by its first rows. Raises ``UserError`` for an error in them or found earlier."""
    descriptions = [_describe_source(source, data.preferences) for source in data.sources]
    files = [(source, path) for source in every_source(data) for path in _local_files(source) or ()]
    raise_cached_error(files, tokens, skips_bad_rows=data.bad_rows == "skip")
    return descriptions


def _unreadable(error: OSError) -> UserError:
    what = f"{error.filename}: {error.strerror}."
    return UserError("Cannot read data", what=what, fix="Check its permissions.")


def _row_warning(problem: DataProblem) -> Check:
    text = (
        f"{problem.title} ({pluralize(problem.count, 'row')} of {Path(problem.path).name}): {problem.example}"
    )
    if not problem.split_rows:
        return Check(CheckKind.DATA, "warning", text, problem.fix)
    about = "about " if problem.is_estimate else ""
    label = f"split into {about}{pluralize(problem.split_rows, 'row')}"
    split = SuggestedFix(label, changes={"data.overflow": "split"})
    return Check(CheckKind.DATA, "warning", text, problem.fix, suggested_fix=split)


def _token_fingerprint(recipe: Recipe, files: ModelFiles | None) -> Tokens | None:
    """Fingerprint that token errors depend on; None without a model, or for a GGUF tokenizer."""
    if files is None or files.gguf_file is not None:
        return None
    return tokenizer_fingerprint(files.folder, recipe.model.chat_template, recipe.data.train_on)


_Fingerprint = tuple[Path, int, bytes, int, int]
"""A file, the index of its source and the source as JSON, the file's modification time in nanoseconds and its
size in bytes."""


def _fingerprints(data: Data) -> tuple[_Fingerprint, ...]:
    return tuple(
        (path, index, msgspec.json.encode(source), *file_fingerprint(path))
        for index, source in enumerate(every_source(data))
        for path in _local_files(source) or ()
    )


def _reading_settings(data: Data) -> bytes:
    """Settings that decide what is read from a row, as JSON."""
    return msgspec.json.encode(
        {
            "preferences": data.preferences,
            "bad_rows": data.bad_rows,
            "max_length": data.max_length,
            "overflow": data.overflow,
        }
    )


@lru_cache(maxsize=4)
def _check_rows(
    fingerprints: tuple[_Fingerprint, ...], settings: bytes, read_columnar: bool
) -> QuickCheckResult | UserError:
    """Return the rows' warnings, or the error that blocks a run; cached: the Train screen checks often."""
    data = msgspec.json.decode(settings, type=Data)
    files = [
        (path, index, msgspec.json.decode(source, type=Source))
        for path, index, source, *_ in fingerprints
        if read_columnar or kind_of(path) not in COLUMNAR
    ]
    try:
        result = quick_check(
            (SourceFile(path, i, sniff(path, source, data.preferences)) for path, i, source in files), data
        )
    except UserError as problem:
        return problem
    return replace(result, complete=result.complete and len(files) == len(fingerprints))


def _local_files(source: Source) -> list[Path] | None:
    """Files of a source; None for a Hub dataset that the run will download."""
    if is_hub_dataset(source.path):
        return local_files(source.path)
    return files_of(Path(source.path).expanduser())[0]


def _describe_source(source: Source, preferences: str) -> str:
    files = _local_files(source)
    if files is None:
        return f"{source.path}, which the run downloads from the Hub"
    kind = kind_of(files[0])
    layout = kind if kind in COLUMNAR else _format_of(files[0], msgspec.json.encode(source), preferences)
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    name = source.path if is_hub_dataset(source.path) else files[0].name
    return f"{name}{more}, {format_bytes(sum(f.stat().st_size for f in files))}, {layout}"


def _format_of(path: Path, source: bytes, preferences: str) -> str:
    """Return the format of a file; cached: Home and the Train screen ask often."""
    return _sniffed_format(path, source, preferences, file_fingerprint(path))


@lru_cache(maxsize=16)
def _sniffed_format(path: Path, source: bytes, preferences: str, _stamp: tuple[int, int]) -> str:
    return sniff(path, msgspec.json.decode(source, type=Source), preferences).layout.format


def _settings(recipe: Recipe) -> list[Check]:
    missing = missing_tracker(recipe.training.report_to)
    return [
        *([_blocked(CheckKind.SETTINGS, missing)] if missing else []),
        *_learning_rate(recipe.training.learning_rate),
        *_reference_point(recipe),
        *(
            Check(CheckKind.SETTINGS, "error", f"{c.what}.", f"{c.fix[:1].upper()}{c.fix[1:]}.")
            for c in find_conflicts(recipe)
        ),
    ]


def _learning_rate(rate: float) -> list[Check]:
    usual = Training().learning_rate
    if rate <= usual * _HIGH_RATE:
        return []
    text = f"Learning rate is {rate:g}, {rate / usual:,.0f} times the usual {usual:g}: the loss may diverge."
    fix = "Lower Learning rate (training.learning_rate)."
    lower = SuggestedFix(f"set Learning rate to {usual:g}", changes={"training.learning_rate": usual})
    return [Check(CheckKind.SETTINGS, "warning", text, fix, suggested_fix=lower)]


def _reference_point(recipe: Recipe) -> list[Check]:
    """Warn where a step of KTO has a single answer, and so no other to estimate the reference point from."""
    if recipe.data.preferences != "kto" or recipe.data.packing or recipe.effective_batch > 1:
        return []
    text = "A step has one answer: KTO cannot estimate how far the model has moved from other answers."
    fix = "Raise Gradient accumulation (training.gradient_accumulation) to 8 or more."
    more = SuggestedFix("set Gradient accumulation to 8", changes={"training.gradient_accumulation": 8})
    return [Check(CheckKind.SETTINGS, "warning", text, fix, suggested_fix=more)]


def _stored_experts(recipe: Recipe, files: ModelFiles) -> list[Check]:
    """Report settings with which the model's experts cannot be read."""
    try:
        require_4_bit_experts(recipe.quantization, files.architecture)
    except UserError as problem:
        return [_blocked(CheckKind.SETTINGS, problem)]
    return []


def _lora(recipe: Recipe, files: ModelFiles) -> list[Check]:
    """Report target patterns that match nothing, and trainable tokens missing from the tokenizer."""
    try:
        targets = resolve_targets(recipe.lora, files.architecture.targets)
        check_optimizer_of_experts(recipe.training.optimizer, targets)
        if files.gguf_file is None:
            check_tokens(recipe.lora.trainable_tokens, files.folder)
        if recipe.lora.init_from:
            return _initial_adapter(recipe, files)
    except UserError as problem:
        return [_blocked(CheckKind.LORA, problem)]
    return []


def _initial_adapter(recipe: Recipe, files: ModelFiles) -> list[Check]:
    """Report an adapter to start from that differs from the recipe, or was trained on another model."""
    folder = initial_adapter(recipe.lora.init_from)
    try:
        require_fit(folder, recipe.lora, files.architecture)
    except UserError as problem:
        return [_blocked(CheckKind.LORA, problem, _its_settings(recipe.lora, folder))]
    base = trained_on(folder)
    if not base or short_model_name(base) in (short_model_name(recipe.model.id), files.folder.name):
        return [Check(CheckKind.LORA, "ok", f"Starts from the adapter in {format_path(folder)}.")]
    text = f"The adapter to start from was trained on {base}, which may be another model than this one."
    fix = "Choose that model, or clear Start from (lora.init_from)."
    return [Check(CheckKind.LORA, "warning", text, fix)]


def _its_settings(lora: Lora, folder: Path) -> SuggestedFix | None:
    """The adapter's LoRA settings in place of the recipe's; None where its folder has no recipe."""
    try:
        theirs = to_frozen_recipe(load(folder / "recipe.toml"), origin=str(folder)).lora
    except UserError:
        return None
    changes = {
        f"lora.{key}": value
        for key, value in msgspec.structs.asdict(theirs).items()
        if key not in ("init_from", "init_weights", "dropout") and value != getattr(lora, key)
    }
    return SuggestedFix("use the adapter's LoRA settings", changes=changes) if changes else None


def _length(recipe: Recipe, files: ModelFiles) -> list[Check]:
    warning = context_length_warning(recipe.data.max_length, files.architecture)
    if warning is None:
        return []
    return [Check(CheckKind.LENGTH, "warning", f"{warning.what} {warning.why}", warning.fix)]


def _memory(recipe: Recipe, files: ModelFiles, budget: MemoryBudget) -> tuple[Check, Estimate | None]:
    try:
        estimated = estimate(recipe, files.architecture, device=budget.device)
    except UserError as problem:
        return Check(CheckKind.MEMORY, "error", problem.what, problem.fix), None
    verdict = check_fit(estimated, budget.bytes)
    needed, available = format_gib(verdict.needed_bytes), format_gib(budget.bytes)
    text = f"{verdict.word}: {needed} of {available} GiB of {budget.name}."
    plan = plan_kept_layers(recipe, files.architecture, budget.bytes, device=budget.device)
    if plan is not None and plan.kept_layers:
        text += f" It will use {format_gib(plan.estimate.total_bytes)}, to recompute fewer layers."
    match verdict.word:
        case "fits":
            check = Check(CheckKind.MEMORY, "ok", text)
        case "does not fit":
            fix = "See the Memory screen for the cheapest fix, or run `qlora-tui estimate`."
            changes = cheapest_changes(recipe, files.architecture, budget.bytes, device=budget.device)
            cheapest = SuggestedFix(changes[0].label, changes=changes[0].settings) if changes else None
            check = Check(CheckKind.MEMORY, "error", text, fix, suggested_fix=cheapest)
        case _:
            low, high = format_gib(verdict.low_bytes), format_gib(verdict.high_bytes)
            fix = f"It may take {low} to {high} GiB: see the Memory screen or `qlora-tui estimate`."
            check = Check(CheckKind.MEMORY, "warning", text, fix)
    return check, estimated


def _checkpoint_bytes(recipe: Recipe, estimated: Estimate | None) -> int:
    """Disk space a run may take: each checkpoint holds the adapter and its optimizer states."""
    one = estimated.bytes_of("adapter") + estimated.bytes_of("optimizer") if estimated else 0
    # In addition to the checkpoints kept there are the best one and the result.
    return one * (recipe.training.keep_checkpoints + 2) + _SPARE_BYTES
