"""Runs that train on preferences, from the recipe to the events."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.recipe.schema import Source
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import DataReady, Evaluated, Step, StepVerified
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of
from tests.training.preference_data import write_pairs, write_rated

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ["orpo", "dpo", "simpo", "kto"])
def test_a_preference_run_learns_which_answer_is_better(
    recipe: MakeRecipe, trainers: Trainers, tmp_path: Path, method: str
) -> None:
    rated = method == "kto"
    file = (write_rated if rated else write_pairs)(tmp_path / "preferences.jsonl")
    run = create_run(
        recipe(
            {
                "data.sources": (Source(path=str(file)),),
                "data.preferences": method,
                "training.epochs": 4.0,
                "training.gradient_accumulation": 1,
                "training.learning_rate": 1e-2,
            }
        )
    )
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
    assert all(step.reward_accuracy is not None for step in events_of(run, Step))
