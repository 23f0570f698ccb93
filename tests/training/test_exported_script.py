"""The script of a recipe for transformers, peft and trl, run as it is written."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from qlora_tui.cli import main
from qlora_tui.recipe.toml import dump
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import Evaluated
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of, losses

pytestmark = pytest.mark.slow


def test_a_script_has_the_loss_of_a_run(
    recipe: MakeRecipe, trainers: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "data.packing": False,
        "lora.dropout": 0.0,
        "training.epochs": 3.0,
        "training.warmup_ratio": 0.0,
        # A step has all 27 rows, whatever their order.
        "training.micro_batch_size": 9,
        "training.gradient_accumulation": 3,
    }
    asked = recipe(settings)
    (tmp_path / "recipe.toml").write_text(dump(asked))
    folder = tmp_path / "script"
    assert main(["export", "recipe", str(tmp_path / "recipe.toml"), str(folder), "--as", "script"]) == 0
    monkeypatch.chdir(folder)
    # Not in a process of its own, which would import all libraries again.
    runpy.run_path("train.py", run_name="__main__")
    state = json.loads((folder / "adapter/checkpoint-3/trainer_state.json").read_text())
    trained = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    validated = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    run = create_run(asked)
    assert trainers.run(run) == 0
    ours = list(losses(run).values())
    assert trained[0] == pytest.approx(ours[0], rel=1e-5)
    # Both draw their adapters, and so differ in what they learn from.
    assert trained == pytest.approx(ours, rel=0.01) and trained[-1] < trained[0] - 0.1
    assert validated[-1] == pytest.approx(events_of(run, Evaluated)[-1].loss, rel=0.02)
    assert (folder / "adapter/adapter_model.safetensors").exists()
