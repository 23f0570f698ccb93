"""Checks of the data before a launch: files, first rows, errors that inspections found, number of steps."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import msgspec

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.local_models import ModelFiles
from qlora_tui.data.counted import SampleLengths, find_counted, nothing_left
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
    tokenizer_fingerprint,
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
from qlora_tui.data.step_plan import StepCount, count_steps
from qlora_tui.errors import UsageError, UserError
from qlora_tui.formatting import capitalize, format_bytes, format_float, format_number, pluralize
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Recipe, Source
from qlora_tui.recipe.training_settings import Training
from qlora_tui.runs.doctor import Check, CheckKind
from qlora_tui.runs.suggested_fix import FEW_STEPS, SuggestedFix

_ENOUGH_STEPS = 30
"""Number of optimizer steps that a fix for too few steps aims at."""
_MARGIN = 1.25
"""Factor by which Max steps and Epochs must differ before an estimate decides which of them ends the run."""
_Fingerprint = tuple[Path, int, bytes, int, int]
"""Identity of a file: path, source index, source as JSON, modification time in ns, size in bytes."""


_FIXES = dict.fromkeys(BAD_ROWS, SuggestedFix("leave bad rows out", changes={"data.bad_rows": "skip"})) | {
    PAIRS: SuggestedFix("train on both answers with ORPO", changes={"data.preferences": "orpo"}),
    RATED: SuggestedFix("train on all answers with KTO", changes={"data.preferences": "kto"}),
    NOTHING_COMPARED: SuggestedFix(
        "train on the answers as they are", changes={"data.preferences": "refuse"}
    ),
}
"""The change of a setting that makes data usable, by error code."""


def check_data(recipe: Recipe, model_files: ModelFiles | None) -> list[Check]:
    """Check the sources, their rows and the step limit. ``model_files`` is None if there is no model."""
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
    counted = None if model_files is None else find_counted(recipe, model_files)
    if counted is not None and not counted.lengths:
        return [Check.blocked(CheckKind.DATA, nothing_left(counted.counts, recipe)), *checks]
    if not complete:
        later = "Rows that have not been read yet are checked when the run starts."
        checks.append(Check(CheckKind.DATA, "note", f"{'; '.join(descriptions)}. {later}"))
    elif not result.warnings:
        checks.append(_rows_used(trained, excluded, f"{'; '.join(descriptions)}."))
    length = run_length(recipe, model_files)
    return [*checks, *(_check_step_limit(recipe, length, model_files) if length else [])]


def data_error(recipe: Recipe, model_files: ModelFiles | None = None) -> UserError | None:
    """Return why the data cannot be trained on, as far as is known; None if it can, or if there is no data.

    Takes up to two seconds for data that was not read before.
    """
    if not recipe.data.sources:
        return None
    return next((check.problem for check in check_data(recipe, model_files) if check.problem), None)


def _check_step_limit(recipe: Recipe, length: RunLength, model: ModelFiles | None) -> list[Check]:
    """Report the number of steps, with a warning if they are too few or if Max steps and Epochs disagree."""
    limit, epochs, steps = recipe.training.max_steps, recipe.training.epochs, length.all_steps
    of_epochs = "1 epoch" if epochs == 1 else f"{format_number(epochs)} epochs"
    margin = 1.0 if length.is_exact else _MARGIN
    suggested_fix = None
    if limit and limit * margin < steps:
        suggested_fix = SuggestedFix("train all epochs", changes={"training.max_steps": 0})
        about = "about" if length.is_complete else "less than"
        text = (
            f"Max steps is {limit:,}, so the run ends after {about} "
            f"{format_float(limit / length.steps_per_epoch, 2)} of {of_epochs}."
        )
        every = f" ({length.about}{pluralize(steps, 'step')})" if length.is_complete else ""
        fix = f"To train all epochs{every}, set Max steps (training.max_steps) to 0."
    elif not length.is_complete:
        return []
    elif length.is_too_short:
        text = f"The run has {length.shortage}."
        sequences = pluralize(recipe.effective_batch, "sequence")
        fix = f"One step takes {sequences}: {advise_more_steps(recipe, length)}."
        suggested_fix = _more_steps(recipe, length, model)
    elif limit > steps * margin:
        text = (
            f"Epochs is {format_number(epochs)}, so the run ends after {length.about}"
            f"{pluralize(steps, 'step')}, before reaching Max steps ({limit:,})."
        )
        fix = "To train longer, raise Epochs (training.epochs)."
    else:
        text = capitalize(f"{length.about}{pluralize(length.steps, 'step')} in {of_epochs}.")
        return [Check(CheckKind.SETTINGS, "ok", text)]
    return [Check(CheckKind.SETTINGS, "warning", text, fix, suggested_fix=suggested_fix)]


def advise_more_steps(recipe: Recipe, length: RunLength, *, brief: bool = False) -> str:
    """Return what makes a run longer, such as ``lower Gradient accumulation (now 8), or raise Epochs``.
    ``brief``: only the first change, in at most 20 cells.
    """
    training = recipe.training
    accumulation, micro_batch = training.gradient_accumulation, training.micro_batch_size
    if length.steps < length.all_steps:
        # Max steps ends the run, so more epochs or smaller batches do not make it longer.
        return "raise Max steps"
    if accumulation > 1:
        return (
            "lower accumulation"
            if brief
            else f"lower Gradient accumulation (now {accumulation}), or raise Epochs"
        )
    if micro_batch > 1:
        return (
            "lower micro-batch" if brief else f"lower Micro-batch size (now {micro_batch}), or raise Epochs"
        )
    return "raise Epochs"


def _more_steps(recipe: Recipe, length: RunLength, model: ModelFiles | None) -> SuggestedFix | None:
    """Suggest a lower gradient accumulation: halved until the run has :data:`_ENOUGH_STEPS` or it is 1.

    Returns None if this gives no more steps.
    """
    path, accumulation, more = "training.gradient_accumulation", recipe.training.gradient_accumulation, length
    while accumulation > 1 and more.steps < _ENOUGH_STEPS:
        accumulation //= 2
        more = run_length(replace_setting(recipe, path, accumulation), model) or length
    if more.steps <= length.steps:
        return None
    steps = f"{more.about}{pluralize(more.steps, 'step')} instead of {length.steps}"
    label = f"set Gradient accumulation to {accumulation}: {steps}"
    return SuggestedFix(label, changes={path: accumulation})


@dataclass(frozen=True)
class RunLength:
    """Number of steps and tokens that a run will have, as far as is known before its launch."""

    steps_per_epoch: int
    all_steps: int
    """Steps of all epochs."""
    steps: int
    """Steps that the run trains. ``training.max_steps`` may end it before all epochs are done."""
    tokens: float
    """Tokens of these steps, without padding."""
    is_exact: bool
    """Whether the figures are exact; otherwise all of them are estimates.

    They are exact if every sample was tokenized and counted, unless answers are replayed or the model is
    recurrent.
    """
    is_complete: bool = True
    """Whether the figures include all of the data. If not, the run is longer."""

    @property
    def about(self) -> str:
        """``about`` and a space before an estimate; empty before an exact figure."""
        return "" if self.is_exact else "about "

    @property
    def is_too_short(self) -> bool:
        """Whether the run has too few steps to learn much; False while not all of the data is counted."""
        return self.is_complete and self.steps < FEW_STEPS

    @property
    def shortage(self) -> str:
        """``only about 6 steps: too few to learn much``; empty unless :attr:`is_too_short`."""
        if not self.is_too_short:
            return ""
        return f"only {self.about}{pluralize(self.steps, 'step')}: too few to learn much"


@dataclass(frozen=True)
class KnownLengths:
    """Lengths of the training samples, as far as they are known before a run."""

    lengths: bytes
    """Number of tokens of each sample, as unsigned 32-bit integers."""
    sources: bytes
    """Index of the source of each sample, as unsigned 16-bit integers."""
    is_exact: bool
    """Whether every sample was tokenized and counted; otherwise the lengths are estimated from the text."""
    is_complete: bool
    """Whether all of the data is included."""

    def samples(self, data: Data) -> SampleLengths:
        """Return the samples with the weights that ``data`` gives their sources."""
        return SampleLengths(array("I", self.lengths), array("H", self.sources), data)


def known_lengths(recipe: Recipe, model: ModelFiles | None) -> KnownLengths | None:
    """Return the lengths of a run's samples; None if the data is not on this machine or cannot be read.

    The samples are those that were counted for this data and model (:mod:`qlora_tui.data.counted`). Where no
    count exists, lengths are estimated from the text.
    """
    counted = None if model is None else find_counted(recipe, model)
    if counted is not None:
        return KnownLengths(counted.lengths, counted.sources, is_exact=True, is_complete=True)
    try:
        result = _check_rows(_fingerprints(recipe.data), _reading_settings(recipe.data))
        all_here = all(_local_files(source) is not None for source in every_source(recipe.data))
    except (UserError, OSError):
        return None
    if isinstance(result, UserError):
        return None
    lengths, sources = _not_held_out(recipe, result.sizes)
    is_complete = result.complete and all_here
    return KnownLengths(lengths.tobytes(), sources.tobytes(), is_exact=False, is_complete=is_complete)


def is_padding_free(recipe: Recipe, architecture: Architecture | None) -> bool:
    """Return whether each micro-batch is one sequence of isolated samples, judging by the model's files."""
    return recipe.model.attention != "eager" and not (
        architecture is not None and (architecture.own_attention or architecture.state_size)
    )


def run_length(recipe: Recipe, model: ModelFiles | None) -> RunLength | None:
    """Return the length of a run; None if its data is elsewhere, unreadable, or without samples."""
    known = known_lengths(recipe, model)
    if known is None:
        return None
    architecture = None if model is None else model.architecture
    settings = msgspec.json.encode((recipe.data, recipe.training))
    count = _count(known, settings, is_padding_free(recipe, architecture))
    if count is None:
        return None
    # Two facts are known only once the base is loaded: which answers are replayed, and what a recurrent model
    # can pack.
    is_exact = known.is_exact and not (
        recipe.training.replay_share or (architecture is not None and architecture.state_size)
    )
    steps = min(count.all_epochs, recipe.training.max_steps or count.all_epochs)
    tokens = count.tokens * steps / count.per_epoch
    return RunLength(count.per_epoch, count.all_epochs, steps, tokens, is_exact, known.is_complete)


@lru_cache(maxsize=16)
def _count(known: KnownLengths, settings: bytes, padding_free: bool) -> StepCount | None:
    """Count the steps for these samples; return None if there are none.

    Cached, because packing 300,000 samples takes a second.
    """
    if not known.lengths:
        return None
    data, training = msgspec.json.decode(settings, type=tuple[Data, Training])
    return count_steps(
        known.samples(data),
        Recipe(data=data, training=training),
        padding_free=padding_free,
        epochs_are_equal=all(source.weight.is_integer() for source in data.sources),
    )


def _not_held_out(recipe: Recipe, sizes: Sequence[FileSize]) -> tuple[array[int], array[int]]:
    """Return lengths and source indices of the estimated samples, except those held out for validation."""
    data = recipe.data
    fraction = 0.0 if data.validation_path else data.validation_fraction
    together = 2 if recipe.trains_pairs else 1
    lengths, sources = array("I"), array("H")
    for size in sizes:
        # The training sources come first. The validation file follows them and is not trained on.
        if size.source < len(data.sources):
            units = len(size.lengths) // together
            held = round(units * fraction)
            kept = (n for n in range(units) if (n + 1) * held // units == n * held // units)
            for n in kept:
                lengths.extend(size.lengths[n * together : (n + 1) * together])
            sources.extend([size.source] * (len(lengths) - len(sources)))
    return lengths, sources


def _rows_used(trained: Sequence[FileSize], excluded: int, text: str) -> Check:
    """Report how many rows are trained on, if not all are. ``text`` describes the sources."""
    rows, used = sum(size.rows for size in trained), sum(size.samples for size in trained)
    if excluded:
        text = f"{text} {pluralize(excluded, 'row')} excluded."
    if used == rows:
        return Check(CheckKind.DATA, "ok", text)
    fix = "See why on the Data screen, or with `qlora-tui data inspect`."
    return Check(CheckKind.DATA, "note", f"{text} About {used:,} of {pluralize(rows, 'row')} are used.", fix)


def _describe_sources(data: Data, tokens: Tokens | None) -> list[str]:
    """Describe each source by its first rows.

    Raises UserError for an error in these rows, or for an error that was found earlier.
    """
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
    """Return the fingerprint of the tokenizer, to look up errors that depend on it.

    None without a model or for a GGUF file.
    """
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
    """Return the settings that determine what is read from a row, as JSON."""
    return msgspec.json.encode(
        {
            "preferences": data.preferences,
            "bad_rows": data.bad_rows,
            "max_length": data.max_length,
            "overflow": data.overflow,
        }
    )


@lru_cache(maxsize=16)
def _check_rows(fingerprints: tuple[_Fingerprint, ...], settings: bytes) -> QuickCheckResult | UserError:
    """Return the result of a quick check of the rows, or the error that prevents a run.

    Cached, because the Train screen checks often.
    """
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
    """Return the files of a source; None for a Hub dataset that the run will download."""
    if is_hub_dataset(source.path):
        return local_files(source.path)
    return paths_of(source)[0]


def _source_notes(data: Data) -> list[str]:
    """Return notes on files that are not read, and on splits used in place of a missing train split."""
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
    """Return the detected format of a file. Cached, because Home and the Train screen ask often."""
    return _sniffed(path, msgspec.json.encode(source), preferences, file_fingerprint(path))


@lru_cache(maxsize=16)
def _sniffed(path: Path, source: bytes, preferences: str, _stamp: tuple[int, int]) -> Detection:
    return sniff(path, msgspec.json.decode(source, type=Source), preferences)
