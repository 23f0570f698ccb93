"""Checks of the data before a launch: its files, the first rows, errors of earlier inspections, number of
steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path

import msgspec

from qlora_tui.catalog.local_models import ModelFiles
from qlora_tui.data.excluded_rows import all_excluded
from qlora_tui.data.formats import Detection
from qlora_tui.data.preferences import (
    NOTHING_COMPARED,
    PAIRS,
    RATED,
)
from qlora_tui.data.problems import BAD_ROWS, DataProblem, error_of, none_used
from qlora_tui.data.quick_check import (
    FileSize,
    QuickCheckResult,
    Tokens,
    file_fingerprint,
    quick_check,
    raise_cached_error,
    steps_per_epoch,
    tokenizer_fingerprint,
    total_steps,
    trained_share,
)
from qlora_tui.data.read import kind_of
from qlora_tui.data.sources import (
    every_source,
    hub_files,
    is_hub_dataset,
    is_training_split,
    local_files,
    open_files,
    paths_of,
    sniff,
)
from qlora_tui.errors import UsageError, UserError
from qlora_tui.formatting import format_bytes, pluralize
from qlora_tui.recipe.schema import Data, Recipe, Source
from qlora_tui.runs.doctor import Check, CheckKind
from qlora_tui.runs.suggested_fix import FEW_STEPS, SuggestedFix

_MARGIN = 1.25
"""Factor between the two limits from which the estimate says for certain which comes first."""
_Fingerprint = tuple[Path, int, bytes, int, int]
"""A file, the index of its source and the source as JSON, the file's modification time in nanoseconds and its
size in bytes."""


_FIXES = dict.fromkeys(BAD_ROWS, SuggestedFix("leave bad rows out", changes={"data.bad_rows": "skip"})) | {
    PAIRS: SuggestedFix("train on both answers with ORPO", changes={"data.preferences": "orpo"}),
    RATED: SuggestedFix("train on all answers with KTO", changes={"data.preferences": "kto"}),
    NOTHING_COMPARED: SuggestedFix(
        "train on the answers as they are", changes={"data.preferences": "refuse"}
    ),
}
"""The change of a setting that makes data usable, by the code of the error."""


def check_data(recipe: Recipe, model_files: ModelFiles | None) -> list[Check]:
    """Check sources, rows and the step limit; ``model_files`` is None without a model."""
    data = recipe.data
    if not data.sources:
        fix = "Choose a file on the Data screen, or pass --data."
        problem = UsageError("No data", what="No data selected.", fix=fix)
        return [Check.blocked(CheckKind.DATA, problem)]
    try:
        descriptions = _describe_sources(data, _token_fingerprint(recipe, model_files))
        result = _check_rows(_fingerprints(data), _reading_settings(data))
        if isinstance(result, UserError):
            raise result
        checks = [Check(CheckKind.DATA, "note", note) for note in _source_notes(data)]
    except UserError as problem:
        return [Check.blocked(CheckKind.DATA, problem, _FIXES.get(problem.code))]
    except OSError as error:
        return [Check.blocked(CheckKind.DATA, _unreadable(error))]
    checks += map(_row_warning, result.warnings)
    all_here = all(_local_files(source) is not None for source in every_source(data))
    complete = result.complete and all_here
    trained = [size for size in result.sizes if size.source < len(data.sources)]
    excluded = sum(size.excluded for size in trained)
    rows = sum(size.rows for size in trained)
    if complete and excluded and not rows:
        return [Check.blocked(CheckKind.DATA, all_excluded(excluded))]
    if complete and rows == sum(size.left_out for size in trained):
        reasons = [problem for problem in result.problems if problem.source < len(data.sources)]
        if none := none_used(rows, reasons):
            return [Check.blocked(CheckKind.DATA, error_of(none)), *checks]
    if not complete:
        later = "Rows not read yet are checked when the run starts."
        checks.append(Check(CheckKind.DATA, "note", f"{'; '.join(descriptions)}. {later}"))
    elif not result.warnings:
        checks.append(_rows_used(trained, excluded, f"{'; '.join(descriptions)}."))
    return [*checks, *check_step_limit(recipe, result.sizes, complete=complete)]


def data_error(data: Data) -> UserError | None:
    """Return why the data cannot be trained on, as far as its first rows and earlier inspections show."""
    try:
        _describe_sources(data, None)
    except UserError as problem:
        return problem
    except OSError as error:
        return _unreadable(error)
    return None


def check_step_limit(recipe: Recipe, sizes: Sequence[FileSize], *, complete: bool) -> list[Check]:
    """Say how many steps the run has, and warn if they are too few or Max steps and Epochs clearly disagree.

    ``sizes``: the data that was read; ``complete``: whether that is all of it.
    """
    limit, epochs = recipe.training.max_steps, recipe.training.epochs
    length = _run_length(recipe, sizes)
    if length is None:
        return []
    steps_of_epoch, steps, _ = length
    of_epochs = "1 epoch" if epochs == 1 else f"{epochs:g} epochs"
    suggested_fix = None
    if limit and limit * _MARGIN < steps:
        suggested_fix = SuggestedFix("train all epochs", changes={"training.max_steps": 0})
        about = "about" if complete else "less than"
        text = (
            f"Max steps is {limit:,}: the run ends after {about} {limit / steps_of_epoch:.2g} of the "
            f"{of_epochs} set."
        )
        every = f" (about {pluralize(steps, 'step')})" if complete else ""
        fix = f"To train all epochs{every}, set Max steps (training.max_steps) to 0."
    elif complete and steps < FEW_STEPS:
        text = f"The run has only about {pluralize(steps, 'step')}: it will learn hardly anything."
        sequences = pluralize(recipe.effective_batch, "sequence")
        fix = f"One step takes {sequences}: raise Epochs, or lower Gradient accumulation or Micro-batch size."
    elif limit and complete and limit > steps * _MARGIN:
        text = (
            f"Epochs is {epochs:g}: the run ends after about {pluralize(steps, 'step')}, before the "
            f"{limit:,} of Max steps."
        )
        fix = "To train longer, raise Epochs (training.epochs)."
    elif complete:
        about = pluralize(min(steps, limit or steps), "step")
        return [Check(CheckKind.SETTINGS, "ok", f"About {about} in {of_epochs}.")]
    else:
        return []
    return [Check(CheckKind.SETTINGS, "warning", text, fix, suggested_fix=suggested_fix)]


def tokens_to_train(recipe: Recipe) -> float | None:
    """Return about how many tokens all steps train on; None unless all the data is here and readable."""
    data = recipe.data
    try:
        result = _check_rows(_fingerprints(data), _reading_settings(data))
        all_here = all(_local_files(source) is not None for source in every_source(data))
    except (UserError, OSError):
        return None
    if isinstance(result, UserError) or not (result.complete and all_here):
        return None
    length = _run_length(recipe, result.sizes)
    if length is None:
        return None
    (steps_of_epoch, steps, tokens), limit = length, recipe.training.max_steps
    return tokens * trained_share(recipe) * min(steps, limit or steps) / steps_of_epoch


def _run_length(recipe: Recipe, sizes: Sequence[FileSize]) -> tuple[int, int, float] | None:
    """Return the steps of an epoch and of all epochs, and the tokens of the data; None without samples."""
    sources = recipe.data.sources
    # The sources come first; after them is the validation file, which no step trains on.
    trained = [(size, sources[size.source].weight) for size in sizes if size.source < len(sources)]
    samples = sum(size.samples * weight for size, weight in trained)
    tokens = sum(size.tokens * weight for size, weight in trained)
    if not samples:
        return None
    steps_of_epoch = steps_per_epoch(samples, tokens, recipe)
    return steps_of_epoch, total_steps(steps_of_epoch, recipe), tokens


def _rows_used(trained: Sequence[FileSize], excluded: int, text: str) -> Check:
    """Say how many rows are trained on, where that is not all of them; ``text`` describes the sources."""
    rows, used = sum(size.rows for size in trained), sum(size.samples for size in trained)
    if excluded:
        text = f"{text} {pluralize(excluded, 'row')} excluded."
    if used == rows:
        return Check(CheckKind.DATA, "ok", text)
    fix = "See why on the Data screen, or with `qlora-tui data inspect`."
    return Check(CheckKind.DATA, "note", f"{text} About {used:,} of {pluralize(rows, 'row')} are used.", fix)


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
def _check_rows(fingerprints: tuple[_Fingerprint, ...], settings: bytes) -> QuickCheckResult | UserError:
    """Return the rows' warnings, or the error that blocks a run; cached: the Train screen checks often."""
    data = msgspec.json.decode(settings, type=Data)
    paths: dict[tuple[int, bytes], list[Path]] = {}
    for path, index, source, *_ in fingerprints:
        paths.setdefault((index, source), []).append(path)
    try:
        files = (
            open_files(msgspec.json.decode(source, type=Source), of_source, data.preferences, index)
            for (index, source), of_source in paths.items()
        )
        return quick_check(chain.from_iterable(files), data)
    except UserError as problem:
        return problem


def _local_files(source: Source) -> list[Path] | None:
    """Files of a source; None for a Hub dataset that the run will download."""
    if is_hub_dataset(source.path):
        return local_files(source.path)
    return paths_of(source)[0]


def _source_notes(data: Data) -> list[str]:
    """Return which files of each source are not read, and which split of a Hub dataset without one for
    training is."""
    notes = []
    for source in every_source(data):
        if not is_hub_dataset(source.path):
            _, note = paths_of(source)
        elif local_files(source.path) is not None and not is_training_split(source.path):
            _, note = hub_files(source.path)
        else:
            note = ""
        notes += [f"{source.path}: {note}."] if note else []
        for path in _local_files(source) or ():
            if kind_of(path) == "json" and (note := _detected(path, source, data.preferences).note):
                notes.append(f"{path.name}: {note}.")
    return notes


def _describe_source(source: Source, preferences: str) -> str:
    files = _local_files(source)
    if files is None:
        return f"{source.path}, which the run downloads from the Hub"
    layout = _detected(files[0], source, preferences).layout.format
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    name = source.path if is_hub_dataset(source.path) else files[0].name
    return f"{name}{more}, {format_bytes(sum(f.stat().st_size for f in files))}, {layout}"


def _detected(path: Path, source: Source, preferences: str) -> Detection:
    """Return what is detected of a file; cached: Home and the Train screen ask often."""
    return _sniffed(path, msgspec.json.encode(source), preferences, file_fingerprint(path))


@lru_cache(maxsize=16)
def _sniffed(path: Path, source: bytes, preferences: str, _stamp: tuple[int, int]) -> Detection:
    return sniff(path, msgspec.json.decode(source, type=Source), preferences)
