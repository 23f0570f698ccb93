"""The process of a learning-rate range test (Smith, arXiv 1506.01186, section 3.3).

``python -m qlora_tui.training.lr_range_worker FOLDER`` reads the recipe in a run's folder that exists only
for the test, prepares the run as a trainer does, and trains its first steps at a rate that rises
exponentially. After each step it writes the test to ``lr_range.json`` there. It saves no adapter.

The losses of two batches differ more than two rates do, so the loss of every batch is first computed without
training: what counts is the difference.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tui.errors import UserError
from qlora_tui.gpu.library_imports import faster_imports
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.lr_range import MANY_EPOCHS, LrRange, RangeSettings, at_learning_rate, read_lr_range
from qlora_tui.runs.measuring_worker import run_measurement
from qlora_tui.training.failure import failure_event, is_out_of_memory

if TYPE_CHECKING:
    from qlora_tui.recipe.schema import Recipe
    from qlora_tui.training.memory_meter import MemoryMeter


def measure(run: RunDir) -> None:
    """Train the steps of the test in ``run``.

    Raises:
        UserError: the recipe, its data or its model cannot be trained, or memory ran out.
        OSError: the test cannot be written.
    """
    lr_range = read_lr_range(run.lr_range_path)
    assert lr_range is not None  # the parent wrote it
    recipe = recipe_of_test(run.recipe(), lr_range.settings)
    meters: list[MemoryMeter] = []
    try:
        _measure(run, recipe, lr_range, meters)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = failure_event(error, run, recipe, meters[0].estimate if meters else None)
        raise UserError(failed.title, what=failed.what, why=failed.why, fix=failed.fix) from error


def recipe_of_test(recipe: Recipe, settings: RangeSettings) -> Recipe:
    """Return the recipe that a test trains: at its lowest rate, from which all rates rise alike."""
    recipe = at_learning_rate(recipe, settings.low)
    for path, value in (
        ("training.max_steps", settings.steps),
        ("training.epochs", MANY_EPOCHS),
        ("training.report_to", "none"),
    ):
        recipe = replace_setting(recipe, path, value)
    return recipe


def _measure(run: RunDir, recipe: Recipe, lr_range: LrRange, meters: list[MemoryMeter]) -> None:
    with faster_imports():
        from qlora_tui.catalog.local_models import resolve_model
        from qlora_tui.training.attempt import create_trainer
        from qlora_tui.training.compute_device import find_device
        from qlora_tui.training.control_requests import ControlRequests
        from qlora_tui.training.distributed import DistributedContext
        from qlora_tui.training.lr_range_trainer import RangeCallback, RangeTrainer
        from qlora_tui.training.memory_meter import MemoryMeter
        from qlora_tui.training.preparation import prepare_run
        from qlora_tui.training.prepared_run import AttemptContext
        from qlora_tui.training.priority import lower_priority
        from qlora_tui.training.reporter import Reporter

    device = find_device(recipe)
    if device.kind == "cpu":
        lower_priority()
    dist, reporter = DistributedContext(), Reporter(run)
    context = AttemptContext(
        run=run,
        recipe=recipe,
        checkpoint=None,
        reporter=reporter,
        requests=ControlRequests(run, reporter, dist),
        dist=dist,
    )
    files = resolve_model(recipe.model.id)
    meters.append(MemoryMeter(recipe, files.architecture, device))
    prepared = prepare_run(context, files, device, meters[0])
    trainer = create_trainer(prepared, RangeTrainer)
    trainer.settings = lr_range.settings
    trainer.add_callback(RangeCallback(prepared, trainer, run.lr_range_path, lr_range))
    trainer.train()


def main() -> int:
    """Measure one test; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qlora_tui.training.lr_range_worker", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, with the recipe and the test without steps")
    return run_measurement(parser.parse_args().run, measure)


if __name__ == "__main__":
    sys.exit(main())
