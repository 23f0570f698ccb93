"""Has the learning-rate range test of a recipe measured, in a child process that loads the model."""

from __future__ import annotations

import time
from collections.abc import Callable

from qlora_tui import paths
from qlora_tui.drafts import new_draft
from qlora_tui.errors import UserError, disk_problems
from qlora_tui.files import atomic_write
from qlora_tui.locks import PATIENCE_S, holder_of, locked, write_holder
from qlora_tui.recipe.absolute_paths import with_absolute_paths
from qlora_tui.recipe.conflicts import require_runnable
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import dump
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.initial_adapter import with_initial_adapter
from qlora_tui.runs.lr_range import LrRange, RangeSettings, read_lr_range, stored_path, write_lr_range
from qlora_tui.runs.measuring import MeasuringStoppedError, StopSwitch, measure_in_child
from qlora_tui.runs.spawn import RATE_TEST, training_lock_path
from qlora_tui.runs.status import ACTIVE, read_status

WORKER = "qlora_tui.training.lr_range_worker"


@disk_problems()
def measure_lr_range(
    recipe: Recipe,
    settings: RangeSettings,
    progress: Callable[[int, int, LrRange], None] = lambda done, total, so_far: None,
    switch: StopSwitch | None = None,
) -> LrRange:
    """Measure the range test of a recipe, and store it. The recipe and its runs stay as they are.

    Args:
        progress: called with the batches passed without training and the steps done, of how many, and the
            test so far.
        switch: ends it, and nothing is stored.

    Raises:
        MeasuringStoppedError: the switch ended it.
        UserError: the recipe, its data or its model cannot be trained, a run is in training or another test
            under way, or memory ran out.
    """
    settings.check()
    require_runnable(recipe)
    with locked(training_lock_path(), patience_s=PATIENCE_S) as lock:
        _require_no_active_run()
        if lock is None:
            is_test = holder_of(training_lock_path()) == RATE_TEST
            raise UserError(
                "Another test is under way" if is_test else "A run starts or ends",
                what="It uses the memory that this test needs.",
                fix="Wait for its end, or stop it.",
            )
        write_holder(lock, RATE_TEST)
        return _measure(recipe, settings, progress, switch or StopSwitch())


def _measure(
    recipe: Recipe,
    settings: RangeSettings,
    progress: Callable[[int, int, LrRange], None],
    switch: StopSwitch,
) -> LrRange:
    with new_draft(paths.runs_dir()) as folder:
        measured = _measure_in(RunDir(folder), recipe, settings, progress, switch)
    if measured is None or not measured.steps:
        raise UserError(
            "The rates could not be tried",
            what="The test ended without a single step.",
            fix="Check the disk that holds the runs, and try again.",
        )
    write_lr_range(stored_path(recipe), measured)
    return measured


def _measure_in(
    run: RunDir,
    recipe: Recipe,
    settings: RangeSettings,
    progress: Callable[[int, int, LrRange], None],
    switch: StopSwitch,
) -> LrRange | None:
    lr_range = LrRange(settings=settings, measured_at=time.time())

    def on_progress(done: int, total: int) -> None:
        progress(done, total, read_lr_range(run.lr_range_path) or lr_range)

    try:
        run.control_dir.mkdir()
        atomic_write(run.recipe_path, dump(with_initial_adapter(with_absolute_paths(recipe))))
        write_lr_range(run.lr_range_path, lr_range)
        measure_in_child(WORKER, run, on_progress, started=switch.attach, subject="the learning rates")
        return read_lr_range(run.lr_range_path)
    except UserError as error:
        if switch.is_stopped:
            raise MeasuringStoppedError from error
        raise


def read_stored(recipe: Recipe) -> LrRange | None:
    """The newest complete test of a recipe on its data as it is now; None where there is none."""
    return read_lr_range(stored_path(recipe))


def _require_no_active_run() -> None:
    """Raise UserError where a run is in training: both would be short of memory."""
    active = next((run for run in all_runs() if read_status(run).state in ACTIVE), None)
    if active is not None:
        raise UserError(
            "A run is in training",
            what=f"{active.name} uses the memory that the test needs.",
            fix=f"Wait for its end, or pause it: `qlora-tui pause {active.id}`.",
        )
