"""Runs that train on preferences: from the recipe to the events, and again from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.recipe.schema import Source
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import DataReady, Evaluated, Started, Step, StepVerified, ValidationCompared
from qlora_tui.runs.retry import RetryPlan
from qlora_tui.runs.run_summary import summarize
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of, losses
from tests.training.preference_data import write_pairs, write_rated
from tests.training.test_resume import EVERY_STEP, interrupted_at
from tests.training.test_step_by_step import MUTANTS

pytestmark = pytest.mark.slow


def test_a_run_whose_chunked_loss_is_wrong_still_compares_answers(
    recipe: MakeRecipe, trainers: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEFORE_TRAINER", MUTANTS["gradients of half the size"])
    sources = (Source(path=str(write_pairs(tmp_path / "pairs.jsonl"))),)
    settings = {"data.sources": sources, "data.preferences": "dpo", "training.max_steps": 1}
    run = create_run(recipe(settings))
    assert trainers.run(run) == 0
    assert [verified.replaced for verified in events_of(run, StepVerified)] == [
        ("the chunked or Liger loss",)
    ]
    assert [step.reward_accuracy is not None for step in events_of(run, Step)] == [True]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_preference_run_learns_and_resumes_in_smaller_batches(
    recipe: MakeRecipe, trainers: Trainers, tmp_path: Path, method: str
) -> None:
    file = (write_rated if method == "kto" else write_pairs)(tmp_path / "preferences.jsonl")
    settings = {
        "data.sources": (Source(path=str(file)),),
        "data.preferences": method,
        "training.epochs": 4.0,
        "training.micro_batch_size": 2,
        "training.gradient_accumulation": 1,
        "training.learning_rate": 1e-2,
    }
    run = create_run(recipe(settings | EVERY_STEP))
    assert trainers.run(run) == 0
    (data,) = events_of(run, DataReady)
    assert data.samples + data.validation_samples == 24
    (verified,) = events_of(run, StepVerified)
    assert verified.agrees
    before, *_, after = events_of(run, Evaluated)
    assert before.loss is not None and after.loss is not None and after.loss < before.loss
    assert after.reward_margin is not None and before.reward_margin is not None
    assert after.reward_margin > before.reward_margin + 0.02
    assert after.reward_accuracy == 1.0
    # A likelier chosen answer is no aim of DPO and KTO.
    assert bool(events_of(run, ValidationCompared)) == (method == "orpo")
    verdict = summarize(run).verdict
    assert verdict is not None and verdict.sentence.endswith("by chance.") == (method != "orpo")
    steps = events_of(run, Step)
    assert all(step.reward_accuracy is not None for step in steps)

    again = interrupted_at(run, len(steps) // 2)
    assert trainers.run(again, RetryPlan(micro_batch_size=1, gradient_accumulation=2)) == 0
    assert events_of(again, Started)[-1].resumed_from_step == len(steps) // 2
    assert losses(again) == pytest.approx(losses(run), rel=1e-3, abs=1e-5)
