"""What a run needs, looked at before it starts: each with a word, and what to do where it is not so.

Used in a thread: it reads the model's files and the data, for some seconds at most.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from qlora_tui import paths
from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.context_length import context_length_warning
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.data.error_cache import Tokens, file_fingerprint, raise_cached_error, tokenizer_fingerprint
from qlora_tui.data.hub_dataset import local_files
from qlora_tui.data.quick_check import QuickCheckResult, quick_check
from qlora_tui.data.read import files_of, kind_of
from qlora_tui.data.sources import SourceFile, every_source, is_of_the_hub, sniff
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes, format_count, format_gib, format_path, pluralize
from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.metrics import GpuProcess
from qlora_tui.gpu.nvml import Nvml
from qlora_tui.memory import Estimate, check_fit, estimate
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.recipe.conflicts import find_conflicts
from qlora_tui.recipe.schema import Data, Recipe, Source
from qlora_tui.tui.system_status import SystemStatus

CheckOutcome = Literal["ok", "warning", "error"]
_TOO_HEAVY = ("parquet", "arrow")
"""Kinds of file whose reader this process does not load; the Data screen's engine looks into them."""
_ROOM_TO_SPARE = 1 << 30
_NOTABLE_BYTES = 512 << 20
"""Memory of the card held by others that is worth a word."""


@dataclass(frozen=True)
class LaunchCheck:
    """One thing that was looked at."""

    name: str
    outcome: CheckOutcome
    text: str
    fix: str = ""


def check_all(recipe: Recipe, room: MemoryBudget, pulse: SystemStatus) -> tuple[LaunchCheck, ...]:
    """Every check, in the order of what to mend first."""
    model, architecture = _model(recipe)
    estimate_or_error = _estimate(recipe, architecture, room)
    checks = [model, _data(recipe), *_settings(recipe), *_length(recipe, architecture)]
    if estimate_or_error is not None:
        checks.append(
            estimate_or_error
            if isinstance(estimate_or_error, LaunchCheck)
            else _memory(estimate_or_error, room)
        )
    needed = estimate_or_error.total_bytes if isinstance(estimate_or_error, Estimate) else 0
    checks += [
        _gpu(pulse, needed),
        _disk(recipe, estimate_or_error if isinstance(estimate_or_error, Estimate) else None),
        _queue(pulse),
    ]
    return tuple(checks)


def _model(recipe: Recipe) -> tuple[LaunchCheck, Architecture | None]:
    if not recipe.model.id:
        return LaunchCheck("model", "error", "No model selected.", "Press 1 to choose one."), None
    try:
        files = resolve_model(recipe.model.id)
    except UserError as problem:
        return LaunchCheck("model", "error", problem.what, problem.fix), None
    weights = "a GGUF file, converted on first use" if files.gguf_file else f"in {format_path(files.folder)}"
    text = f"{format_count(files.architecture.total_params)} parameters, {weights}."
    return LaunchCheck("model", "ok", text), files.architecture


def _data(recipe: Recipe) -> LaunchCheck:
    if not recipe.data.sources:
        return LaunchCheck("data", "error", "No data selected.", "Press 2 to choose a file.")
    try:
        descriptions = [_source(source, recipe.data.preferences) for source in recipe.data.sources]
        raise_cached_error(_all_files(recipe.data), _tokens(recipe))
        rows = _rows(_stamped(recipe.data), _reading(recipe.data))
    except UserError as problem:
        return LaunchCheck("data", "error", problem.what, problem.fix)
    except OSError as error:
        return LaunchCheck(
            "data", "error", f"{error.filename}: {error.strerror}.", "Check the file's permissions."
        )
    if isinstance(rows, UserError):
        return LaunchCheck("data", "error", rows.what, rows.fix)
    if rows.warnings:
        first = rows.warnings[0]
        return LaunchCheck(
            "data", "warning", f"{first.title} ({pluralize(first.count, 'row')}): {first.example}", first.fix
        )
    all_read = rows.complete and all(_files(source) is not None for source in every_source(recipe.data))
    more = "" if all_read else " Not all rows were read yet: the run checks them when it starts."
    return LaunchCheck("data", "ok", f"{'; '.join(descriptions)}.{more}")


_Stamped = tuple[Path, bytes, int, int]
"""A file, its source as JSON, and what changes with the file: its time in nanoseconds and size in bytes."""


def _all_files(data: Data) -> list[tuple[Source, Path]]:
    """Those that are here, each with its source."""
    return [(source, path) for source in every_source(data) for path in _files(source) or ()]


def _tokens(recipe: Recipe) -> Tokens | None:
    """What errors in tokens depend on; None without a model, or where its tokenizer is inside a GGUF file."""
    try:
        files = resolve_model(recipe.model.id)
    except UserError:
        return None
    if files.gguf_file is not None:
        return None
    return tokenizer_fingerprint(files.folder, recipe.model.chat_template, recipe.data.train_on)


def _stamped(data: Data) -> tuple[_Stamped, ...]:
    return tuple(
        (path, msgspec.json.encode(source), *file_fingerprint(path)) for source, path in _all_files(data)
    )


def _reading(data: Data) -> bytes:
    """The settings that decide what is read of a row, as JSON."""
    return msgspec.json.encode(
        {"preferences": data.preferences, "max_length": data.max_length, "overflow": data.overflow}
    )


@lru_cache(maxsize=4)
def _rows(stamped: tuple[_Stamped, ...], reading: bytes) -> QuickCheckResult | UserError:
    """What a look at the rows shows, or what blocks a run; kept, since the checks are made again."""
    data = msgspec.json.decode(reading, type=Data)
    light = [(path, source) for path, source, *_ in stamped if kind_of(path) not in _TOO_HEAVY]
    files = (
        SourceFile(path, 0, sniff(path, msgspec.json.decode(source, type=Source), data.preferences))
        for path, source in light
    )
    try:
        looked = quick_check(files, data)
        return QuickCheckResult(looked.complete and len(light) == len(stamped), looked.warnings)
    except UserError as problem:
        return problem


def _files(source: Source) -> list[Path] | None:
    """None for a dataset of the hub that has yet to be fetched: a look does not wait for that."""
    if is_of_the_hub(source.path):
        return local_files(source.path)
    return files_of(Path(source.path).expanduser())[0]


def _source(source: Source, preferences: str) -> str:
    files = _files(source)
    if files is None:
        return f"{source.path}, which the run fetches from the hub"
    kind = kind_of(files[0])
    layout = kind if kind in _TOO_HEAVY else sniff(files[0], source, preferences).layout.format
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    name = source.path if is_of_the_hub(source.path) else files[0].name
    return f"{name}{more}, {format_bytes(sum(f.stat().st_size for f in files))}, {layout}"


def _settings(recipe: Recipe) -> list[LaunchCheck]:
    return [
        LaunchCheck("settings", "error", f"{c.what}.", f"{c.fix[:1].upper()}{c.fix[1:]}.")
        for c in find_conflicts(recipe)
    ]


def _length(recipe: Recipe, architecture: Architecture | None) -> list[LaunchCheck]:
    warning = architecture and context_length_warning(recipe.data.max_length, architecture)
    return [LaunchCheck("length", "warning", f"{warning.what} {warning.why}", warning.fix)] if warning else []


def _estimate(
    recipe: Recipe, architecture: Architecture | None, room: MemoryBudget
) -> Estimate | LaunchCheck | None:
    if architecture is None:
        return None
    try:
        return estimate(recipe, architecture, device=room.device)
    except UserError as problem:
        return LaunchCheck("memory", "error", problem.what, problem.fix)


def _memory(estimate: Estimate, room: MemoryBudget) -> LaunchCheck:
    verdict = check_fit(estimate, room.bytes)
    text = (
        f"{verdict.word}: {format_gib(verdict.needed_bytes)} of {format_gib(room.bytes)} GiB of {room.name}."
    )
    match verdict.word:
        case "fits":
            return LaunchCheck("memory", "ok", text)
        case "does not fit":
            return LaunchCheck("memory", "error", text, "Press 3 and a: the cheapest change that fits.")
        case _:
            band = (
                f"It may take {format_gib(verdict.low_bytes)} to {format_gib(verdict.high_bytes)} "
                "GiB. Press 3 to look."
            )
            return LaunchCheck("memory", "warning", text, band)


def _gpu(pulse: SystemStatus, needed_bytes: int) -> LaunchCheck:
    if pulse.gpu is None:
        why = f" {pulse.no_gpu_reason}" if pulse.no_gpu_reason else ""
        return LaunchCheck("card", "warning", f"None: it trains on the CPU, slowly.{why}")
    name, free = pulse.gpu.short_name, pulse.free_bytes
    if pulse.gpu_metrics is None:
        return LaunchCheck(
            "card",
            "warning",
            f"{name} does not answer: {pulse.no_gpu_reason}",
            "Run `qlora-tui doctor` to diagnose.",
        )
    used = pulse.gpu_metrics.memory_used_bytes
    if pulse.active is not None or used is None or used < _NOTABLE_BYTES:
        return LaunchCheck("card", "ok", f"{name}, {format_gib(free)} GiB free.")
    text = f"{name}: {format_gib(used)} GiB are held by {_gpu_processes(pulse)}."
    if free is not None and free < needed_bytes:
        return LaunchCheck(
            "card", "error", text, f"Close what holds it: the run needs {format_gib(needed_bytes)} GiB."
        )
    return LaunchCheck("card", "warning", text, "Memory they allocate later is not available to this run.")


def _gpu_processes(pulse: SystemStatus) -> str:
    assert pulse.gpu is not None
    try:
        with Nvml() as nvml:
            processes = nvml.read(pulse.gpu.index, processes=True).processes
    except GpuUnavailableError:
        processes = None
    return ", ".join(_process(p) for p in (processes or ())[:3]) or "other programs"


def _process(process: GpuProcess) -> str:
    try:
        name = psutil.Process(process.pid).name()
    except psutil.Error:
        name = "a process"
    return f"{name} ({process.pid})"


def _disk(recipe: Recipe, estimate: Estimate | None) -> LaunchCheck:
    folder = paths.runs_dir()
    free = shutil.disk_usage(folder).free
    # A checkpoint holds the adapter and its optimizer states; beside those kept are the best and the result.
    one = estimate.bytes_of("adapter") + estimate.bytes_of("optimizer") if estimate else 0
    needed = one * (recipe.training.keep_checkpoints + 2) + _ROOM_TO_SPARE
    text = f"{format_bytes(free)} free for checkpoints in {format_path(folder)}."
    if free < needed:
        return LaunchCheck("disk", "error", text, f"Free some: the run may take {format_bytes(needed)}.")
    return LaunchCheck("disk", "ok", text)


def _queue(pulse: SystemStatus) -> LaunchCheck:
    ahead = len(pulse.waiting) + (pulse.active is not None)
    if not ahead:
        return LaunchCheck("turn", "ok", "Nothing else is running: it starts at once.")
    who = pulse.active.id if pulse.active is not None else pulse.waiting[0]
    more = f" and {ahead - 1} more" if ahead > 1 else ""
    return LaunchCheck("turn", "warning", f"It waits behind {who}{more}.", "Press 6 to change the order.")


def errors(checks: tuple[LaunchCheck, ...]) -> tuple[LaunchCheck, ...]:
    """Those that a run would fail of."""
    return tuple(check for check in checks if check.outcome == "error")
