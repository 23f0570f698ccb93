"""The steps of a learning-rate range test: those that the run's trainer takes."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")

from qlora_tui.errors import UserError
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.lr_range import LrRange, RangeSettings, read_lr_range, write_lr_range
from qlora_tui.runs.view import RunView
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe

pytestmark = pytest.mark.slow


def measured(recipe: Recipe, settings: RangeSettings) -> tuple[RunDir, LrRange]:
    from qlora_tui.training.lr_range_worker import measure

    run = create_run(recipe)
    write_lr_range(run.lr_range_path, LrRange(settings=settings, measured_at=0.0))
    measure(run)
    lr_range = read_lr_range(run.lr_range_path)
    assert lr_range is not None
    return run, lr_range


def test_running_out_of_memory_is_explained(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_tui.training import lr_range_worker

    def run_out(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(lr_range_worker, "_measure", run_out)
    with pytest.raises(UserError, match="Out of memory") as caught:
        measured(recipe(), RangeSettings())
    assert caught.value.fix


def test_its_steps_are_those_of_a_run(recipe: MakeRecipe, trainers: Trainers) -> None:
    """At a constant rate, more than an epoch long, with dropout, clipping and accumulation."""
    settings = {
        "lora.dropout": 0.1,
        "training.learning_rate": 1e-2,
        "training.max_grad_norm": 0.1,
        "training.lr_scheduler": "constant",
        "training.warmup_ratio": 0.0,
        "data.max_length": 64,
        "training.epochs": 2.0,
    }
    run = create_run(recipe(settings))
    assert trainers.run(run) == 0
    view = RunView(run)
    view.refresh()
    total = len(view.series.loss)
    constant = RangeSettings(low=1e-2, high=1e-2, steps=total)
    _, lr_range = measured(replace_setting(recipe(settings), "training.learning_rate", 0.5), constant)
    assert [step.loss for step in lr_range.steps] == pytest.approx(list(view.series.loss), abs=1e-5)
    first = lr_range.steps[0]
    assert first.loss == pytest.approx(first.untrained, abs=1e-5)


def test_it_ends_where_the_loss_diverges_and_saves_no_adapter(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_tui.training import lr_range_trainer

    monkeypatch.setattr(lr_range_trainer, "has_diverged", lambda steps: len(steps) == 5)
    settings = RangeSettings(low=1e-4, high=1e-1, steps=24)
    run, lr_range = measured(recipe({"training.lora_plus_ratio": 4.0}), settings)
    assert lr_range.diverged
    assert [step.rate for step in lr_range.steps] == pytest.approx([settings.rate(n) for n in range(5)])
    assert all(math.isfinite(step.untrained) for step in lr_range.steps)
    assert not run.adapter_dir.exists() and not list(run.checkpoints_dir.iterdir())
