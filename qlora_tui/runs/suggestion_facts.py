"""Gathers the facts for :mod:`.suggestions`: sample lengths, free memory, and results of earlier runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import cast

from qlora_tui.catalog.local_models import describe_model, find_files, load_architecture
from qlora_tui.data.sources import every_source, source_stamps
from qlora_tui.errors import UsageError, UserError
from qlora_tui.recipe.fields import fields, replace_setting
from qlora_tui.recipe.layering import with_absolute_paths
from qlora_tui.recipe.schema import Recipe
from qlora_tui.remote.calls import at_box
from qlora_tui.runs.data_checks import data_error, known_lengths
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.doctor import Machine
from qlora_tui.runs.events import Finished, Stopped
from qlora_tui.runs.evidence import PastRun
from qlora_tui.runs.expected_time import count_data
from qlora_tui.runs.preflight import gpus_of_run
from qlora_tui.runs.suggestions import SuggestionFacts
from qlora_tui.runs.view import RunView, finite_losses
from qlora_tui.worker import Progress

_RUNS = 100
"""Maximum number of earlier runs that are read, newest first."""
_STEPS = 2
"""Number of steps sampled from each run. Only the evaluations are used."""


@at_box
def read_facts(
    recipe: Recipe,
    machine: Machine,
    on_progress: Callable[[Progress], object] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SuggestionFacts:
    """Count the tokens of the samples before truncation, and read the results of earlier runs on the same
    data.

    Lengths are estimated if there is no tokenizer, or too much data to count.

    Raises:
        JobStopped: ``should_stop`` returned true.
        UserError: There is no model or no data, or either cannot be used.
    """
    if not recipe.has_model_and_data:
        raise UsageError(
            "Nothing to suggest",
            what="Suggestions need a model and data, and the recipe lacks at least one of them.",
            fix="Select them on the Model and Data screens, or pass --model and --data.",
        )
    _, recipe, machine = gpus_of_run(recipe, machine)
    architecture = load_architecture(recipe.model.id)
    if architecture.is_outline:
        architecture = describe_model(recipe.model.id)
    whole = replace_setting(recipe, "data.max_length", cast("int", fields()["data.max_length"].maximum))
    try:
        model = find_files(recipe.model.id)
        count_data(whole, on_progress, should_stop)
    except UserError:
        # Only the tokenizer is missing. Problems of the data appear again below.
        model = None
    known = known_lengths(whole, model)
    if known is None or not known.lengths:
        raise data_error(recipe, model) or UserError(
            "No samples",
            what="The data has no sample to train on.",
            fix="The Data screen, or `qlora-tui data inspect`, shows the reason.",
        )
    # Use absolute paths, as the recipes of runs do.
    past, outdated = _past_runs(with_absolute_paths(recipe))
    return SuggestionFacts(
        recipe=recipe,
        architecture=architecture,
        device=machine.budget.device,
        device_name=machine.budget.name,
        free_bytes=_free_bytes(machine),
        known=known,
        past=past,
        outdated=outdated,
    )


def _free_bytes(machine: Machine) -> int:
    """Return the free memory, in bytes. Return all memory if its size is only assumed, if the free memory is
    unknown, or if a run is active, because that run will free its memory.
    """
    if machine.active or machine.budget.is_assumed or machine.free_bytes is None:
        return machine.budget.bytes
    return machine.free_bytes


def _past_runs(recipe: Recipe) -> tuple[tuple[PastRun, ...], int]:
    """Return the results of earlier runs with the recipe's model and data files.

    Also returns the number of such runs that are left out because the files have changed since.
    """
    sources = list(every_source(recipe.data))
    stamps = [stamp for source in sources for stamp in source_stamps(source)]
    changed_at = max((modified_ns / 1e9 for _, modified_ns, _ in stamps), default=0.0)
    names = [source.path for source in sources]
    past: list[PastRun] = []
    outdated = 0
    for run, its_recipe in _same_data(recipe.model.id, names):
        view, _ = RunView.from_sample(run, _STEPS)
        result = _result(run, its_recipe, view)
        if result is None or view.data is None:
            continue
        if view.data.at >= changed_at:
            past.append(result)
        else:
            outdated += 1
    # Keep only runs with the same prepared data as the newest one.
    return tuple(one for one in past if one.data_hash == past[0].data_hash), outdated


def _same_data(model: str, names: list[str]) -> Iterator[tuple[RunDir, Recipe]]:
    for run in islice(all_runs(), _RUNS):
        recipe = run.readable_recipe()
        if recipe is None or recipe.model.id != model:
            continue
        if [source.path for source in every_source(recipe.data)] == names:
            yield run, recipe


def _result(run: RunDir, recipe: Recipe, view: RunView) -> PastRun | None:
    """Return the result of a run that finished or was stopped; None for any other run, or if no validation
    loss was measured after step 0.
    """
    if not isinstance(view.ending, Finished | Stopped):
        return None
    data, best = view.data, view.best
    losses = [(step, loss) for step, loss in finite_losses(view.evaluations) if step]
    if data is None or not data.steps_per_epoch or best is None or not losses:
        return None
    if best.loss is None or not math.isfinite(best.loss):
        return None
    last_step, _ = losses[-1]
    per_epoch = data.steps_per_epoch
    return PastRun(run.name, recipe, data.data_hash, best.loss, best.step / per_epoch, last_step / per_epoch)
