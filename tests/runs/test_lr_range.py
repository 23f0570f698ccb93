"""Learning-rate range tests: what a curve suggests, when it gives no answer, and what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_tui import paths
from qlora_tui.drafts import is_ours
from qlora_tui.errors import UserError
from qlora_tui.memory.budget import budget_for
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Recipe, Source
from qlora_tui.runs import lr_range_job, measuring, run_queue, runner
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.lr_range import (
    LrRange,
    RangeSettings,
    RangeStep,
    at_learning_rate,
    has_diverged,
    read_lr_range,
    stored_path,
    write_lr_range,
)
from qlora_tui.runs.lr_range_job import measure_lr_range, read_stored
from qlora_tui.runs.lr_suggestion import RangeCurve, format_rate, read_curve, suggested_rate
from qlora_tui.runs.machine_checks import Machine, read_machine
from qlora_tui.runs.measuring import MeasuringStoppedError, StopSwitch
from qlora_tui.runs.preflight import preflight
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.spawn import RATE_TEST, training_lock_path
from qlora_tui.runs.status import Status, write_status
from qlora_tui.training.lr_range_worker import recipe_of_test
from tests.support.lr_range_worker_stub import curve_steps

SETTINGS = RangeSettings()
STUB = "tests.support.lr_range_worker_stub"


def curve_of(steps: tuple[RangeStep, ...], *, diverged: bool = True) -> RangeCurve:
    return read_curve(LrRange(settings=SETTINGS, measured_at=0.0, steps=steps, diverged=diverged))


def test_rates_rise_evenly_on_a_logarithmic_scale() -> None:
    rates = [SETTINGS.rate(step) for step in range(60)]
    assert (rates[0], rates[-1]) == pytest.approx((1e-6, 1e-1))
    factor = 1e5 ** (1 / 59)
    assert rates[1:] == pytest.approx([rate * factor for rate in rates[:-1]])


@pytest.mark.parametrize(
    "settings", [RangeSettings(steps=19), RangeSettings(low=0.1), RangeSettings(high=2.0)]
)
def test_settings_that_make_no_curve_are_refused(settings: RangeSettings) -> None:
    with pytest.raises(UserError, match="Invalid range test"):
        settings.check()


def test_a_tenth_of_the_lowest_rate_is_suggested() -> None:
    curve = curve_of(curve_steps(SETTINGS))
    assert curve.lowest is not None and curve.suggested is not None
    assert 2e-3 < curve.rates[curve.lowest] < 8e-3
    assert curve.suggested == pytest.approx(curve.rates[curve.lowest] / 10, rel=0.05)
    assert curve.start == pytest.approx(1.8, abs=0.03)
    assert format_rate(curve.suggested) in curve.sentence
    # The batches differ by 1.2, their changes at the lowest rates by 0.004.
    assert max(curve.losses[:20]) - min(curve.losses[:20]) < 0.01


def test_a_loss_that_hardly_falls_gives_no_answer() -> None:
    curve = curve_of(curve_steps(SETTINGS, fall=0.01))
    assert curve.suggested is None
    assert "did not fall clearly" in curve.sentence


def test_a_fall_within_the_noise_gives_no_answer() -> None:
    noisy = tuple(
        RangeStep(step.rate, (step.loss or 0) + (0.3, -0.3)[number // 3 % 2], step.untrained)
        for number, step in enumerate(curve_steps(SETTINGS, fall=0.1))
    )
    assert "did not fall clearly" in curve_of(noisy).sentence


def test_a_loss_still_falling_gives_no_answer() -> None:
    falling = tuple(step for step in curve_steps(SETTINGS) if step.rate < 3e-3)
    curve = curve_of(falling, diverged=False)
    assert curve.suggested is None
    assert "still falling at the highest rate" in curve.sentence


def test_a_lowest_loss_at_the_lowest_rates_gives_no_answer() -> None:
    moved = tuple(RangeStep(step.rate / 1000, step.loss, step.untrained) for step in curve_steps(SETTINGS))
    assert "Begin at a lower rate" in curve_of(moved).sentence


def test_steps_without_a_finite_loss_are_left_out() -> None:
    steps = (*curve_steps(SETTINGS), RangeStep(5e-2, None, 1.0))
    assert has_diverged(steps)
    assert len(curve_of(steps).rates) == len(steps) - 1
    assert "no step has a finite loss" in curve_of((RangeStep(1e-6, None, 1.0),)).sentence


def test_a_test_diverges_far_above_lowest_and_first_loss() -> None:
    def risen_to(*losses: float) -> bool:
        return has_diverged(tuple(RangeStep(1e-3, loss, 1.5) for loss in losses))

    assert not risen_to(1.5, 1.5, 1.5, 1.2, 1.2, 1.2, 2.3, 2.3, 2.3)
    assert risen_to(1.5, 1.5, 1.5, 1.2, 1.2, 1.2, 2.5, 2.5, 2.5)
    # From a loss near zero, twice that is nothing yet.
    assert not risen_to(1.5, 1.5, 1.5, 0.1, 0.1, 0.1, 1.0, 1.0, 1.0)
    assert not has_diverged(())


def test_a_result_belongs_to_recipe_and_data(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    recipe = Recipe(data=Data(sources=(Source(path=str(file)),)))

    def changed(path: str, value: Any) -> Path:
        return stored_path(replace_setting(recipe, path, value))

    before = stored_path(recipe)
    assert changed("training.learning_rate", 0.1) == changed("training.epochs", 9.0) == before
    assert changed("training.task_prompts", 9) == changed("quantization.streamed_layers", 2) == before
    assert changed("lora.rank", 99) != before
    assert changed("training.embedding_learning_rate", 1e-5) != before
    assert changed("training.optimizer", "lion") != before
    file.write_text("{}\n{}\n")
    assert stored_path(recipe) != before


def test_a_used_rate_keeps_the_embeddings_ratio_and_the_test() -> None:
    recipe = replace_setting(Recipe(), "training.embedding_learning_rate", 3e-5)
    at_rate = at_learning_rate(recipe, 1.4e-4)
    assert at_rate.training.learning_rate == 1.4e-4
    assert at_rate.training.embedding_learning_rate == 2.1e-5
    assert stored_path(at_rate) == stored_path(recipe)
    assert at_learning_rate(Recipe(), 0.1).training.embedding_learning_rate == 0


def test_a_complete_test_is_stored_and_nothing_else(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lr_range_job, "WORKER", STUB)
    monkeypatch.setenv("LR_RANGE_STEPS", "30")
    seen: list[int] = []
    measured = measure_lr_range(recipe, SETTINGS, lambda done, total, so_far: seen.append(len(so_far.steps)))
    assert len(measured.steps) == seen[-1] == 30
    assert read_stored(replace_setting(recipe, "training.learning_rate", 0.5)) == measured
    assert not list(paths.runs_dir().iterdir())


def test_a_stopped_test_leaves_nothing(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lr_range_job, "WORKER", STUB)
    switch = StopSwitch()
    with pytest.raises(MeasuringStoppedError):
        measure_lr_range(recipe, SETTINGS, lambda done, total, so_far: switch.stop(), switch)
    assert read_stored(recipe) is None
    assert not list(paths.runs_dir().iterdir())


def test_one_test_runs_at_a_time(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lr_range_job, "WORKER", STUB)
    monkeypatch.setattr(lr_range_job, "PATIENCE_S", 0.0)
    refused: list[str] = []

    def measure_again(done: int, total: int, so_far: LrRange) -> None:
        if refused:
            return
        monkeypatch.setenv("LR_RANGE_STEPS", "1")  # so that a test that is not refused ends
        with pytest.raises(UserError) as refusal:
            measure_lr_range(recipe, SETTINGS)
        refused.append(refusal.value.title)
        assert read_machine().tests_rates
        switch.stop()

    switch = StopSwitch()
    with pytest.raises(MeasuringStoppedError):
        measure_lr_range(recipe, SETTINGS, measure_again, switch)
    assert refused == ["Another test is under way"] and not read_machine().tests_rates


def test_a_runner_with_the_lock_is_no_test(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lr_range_job, "PATIENCE_S", 0.0)
    held: list[bool] = []

    def begin(run: RunDir) -> None:
        held.append(read_machine().tests_rates)
        with pytest.raises(UserError) as refused:
            measure_lr_range(recipe, SETTINGS)
        held.append(refused.value.title == "A run starts or ends")
        run_queue.remove(run)

    monkeypatch.setattr(runner, "_begin", begin)
    training_lock_path().write_text(RATE_TEST)  # of a test that was killed
    run_queue.enqueue(create_run(recipe))
    runner._run_queue(set())
    assert held == [False, True]


def test_a_failed_tests_folder_is_a_draft_and_deleted(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lr_range_job, "WORKER", "no_such_module")
    drafts: list[list[Path]] = []
    measure = measuring.measure_in_child

    def measured(module: str, run: RunDir, *args: Any, **how: Any) -> None:
        drafts.append([path for path in paths.runs_dir().iterdir() if is_ours(path)])
        measure(module, run, *args, **how)

    monkeypatch.setattr(lr_range_job, "measure_in_child", measured)
    with pytest.raises(UserError, match="No module named no_such_module"):
        measure_lr_range(recipe, SETTINGS)
    assert len(drafts[0]) == 1 and not list(paths.runs_dir().iterdir())


def test_a_test_waits_for_the_run_in_training(recipe: Recipe, run: RunDir) -> None:
    write_status(run, Status(state="running", at=1.0, process=process_identity()))
    with pytest.raises(UserError, match="in training"):
        measure_lr_range(recipe, SETTINGS)


def test_a_high_rate_that_was_suggested_is_no_warning(recipe: Recipe) -> None:
    high = replace_setting(recipe, "training.learning_rate", 4e-3)

    def is_warned() -> bool:
        checks = preflight(high, Machine(budget_for(None)), read_columnar=False)
        return any("the loss may diverge" in check.text for check in checks)

    assert is_warned()
    steps = tuple(RangeStep(step.rate * 10, step.loss, step.untrained) for step in curve_steps(SETTINGS))
    lr_range = LrRange(settings=SETTINGS, measured_at=0.0, steps=steps, diverged=True)
    write_lr_range(stored_path(high), lr_range)
    assert suggested_rate(high) == pytest.approx(4e-3, rel=0.3)
    high = replace_setting(high, "training.learning_rate", suggested_rate(high))
    assert not is_warned()
    high = replace_setting(high, "training.learning_rate", 2e-2)
    assert is_warned()


def test_a_damaged_result_counts_as_none(tmp_path: Path) -> None:
    damaged = tmp_path / "result.json"
    damaged.write_text('{"settings": 3}')
    assert read_lr_range(damaged) is None


@pytest.mark.parametrize(("rate", "text"), [(4.87e-4, "4.9e-4"), (1e-3, "1e-3"), (0.1, "1e-1")])
def test_rates_have_two_digits(rate: float, text: str) -> None:
    assert format_rate(rate) == text


@pytest.mark.parametrize(("embedding_rate", "lowest"), [(2e-5, 1e-7), (0.0, 0.0)])
def test_rates_rise_from_the_same_ratio(embedding_rate: float, lowest: float) -> None:
    changed = replace_setting(Recipe(), "training.learning_rate", 2e-4)
    changed = replace_setting(changed, "training.embedding_learning_rate", embedding_rate)
    training = recipe_of_test(changed, RangeSettings(low=1e-6)).training
    assert training.learning_rate == 1e-6
    assert training.embedding_learning_rate == pytest.approx(lowest)
