"""What a tracker gets of a run, and that one that fails ends none. No tracker is installed here."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from msgspec import structs

from qlora_tui.errors import UserError
from qlora_tui.installation import install_command
from qlora_tui.recipe.schema import Data, Lora, Model, Recipe, Source
from qlora_tui.recipe.training_settings import Training
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import Evaluated, Finished, Step
from qlora_tui.training import tracker
from qlora_tui.training.tracker import RunTracker, describe_failure, tracked_numbers, tracked_settings
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of

pytestmark = pytest.mark.slow

RECIPE = Recipe(
    name="owls",
    note="private",
    model=Model(id="/home/me/model"),
    lora=Lora(rank=4, init_from="/home/me/runs/first/adapter"),
    data=Data(sources=(Source(path="/home/me/rows.jsonl"), Source(path="org/set"))),
    training=Training(report_to="mlflow", sample_prompts=("private",)),
)
STEP = Step(at=1, step=3, epoch=0.5, loss=None, learning_rate=1e-3, grad_norm=2.0, tokens=9, tokens_per_s=4.0)


class FakeIntegration:
    """Records what it gets as JSON lines, as transformers' integrations are called."""

    file: Path
    fails = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write({"run": args.run_name, **args.to_dict()})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.fails:
            raise ConnectionError("no answer from http://me:pass@host, key abcdefgh12.\nmore")
        self.write({"at": state.global_step, **logs})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write({"ended": True})

    def write(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")


@pytest.fixture
def integration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeIntegration]:
    """A fake in the place of Trackio's integration."""

    class Recording(FakeIntegration):
        file = tmp_path / "tracked.jsonl"

    monkeypatch.setitem(tracker._INTEGRATIONS, "trackio", Recording)
    monkeypatch.setattr(tracker, "missing_tracker", lambda report_to: None)
    return Recording


def tracked(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_settings_have_neither_paths_nor_texts_of_the_user() -> None:
    settings = tracked_settings(RECIPE)
    assert (settings["lora.rank"], settings["model.id"]) == (4, "model")
    assert settings["data.sources"] == "rows.jsonl, set"
    assert "/home" not in str(settings) and "private" not in str(settings)


def test_a_tracker_that_fails_is_left_alone(
    integration: type[FakeIntegration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[Exception] = []
    recipe = Recipe(training=Training(report_to="trackio"))
    run_tracker = RunTracker(RunDir(tmp_path / "run"), recipe, failures.append)
    run_tracker.start()
    run_tracker.observe(STEP)
    monkeypatch.setattr(integration, "fails", True)
    run_tracker.observe(STEP)
    run_tracker.observe(STEP)
    run_tracker.close()
    assert [type(failure) for failure in failures] == [ConnectionError]
    # A loss that was not a number is not sent.
    assert "loss" not in tracked(integration.file)[1] and len(tracked(integration.file)) == 2
    monkeypatch.setenv("OWL_API_KEY", "abcdefgh12")
    evidence, _ = describe_failure("trackio", failures[0])
    assert evidence == "Trackio failed: no answer from http://…@host, key …. The run continues."


def test_numbers_that_are_not_finite_are_not_sent() -> None:
    step = structs.replace(STEP, reward_accuracy=0.5, reward_margin=math.nan, grad_norm=math.inf)
    assert {"rewards/accuracies", "grad_norm", "rewards/margins"} & tracked_numbers(step).keys() == {
        "rewards/accuracies"
    }


def test_a_variable_of_the_user_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_DIR", "WANDB_CONSOLE", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    tracker._set_defaults("wandb", RunDir(tmp_path / "first"))
    assert (os.environ["WANDB_PROJECT"], os.environ["WANDB_RUN_ID"]) == ("mine", "first")


def test_a_missing_package_is_named_before_the_run(tmp_path: Path) -> None:
    run_tracker = RunTracker(RunDir(tmp_path), RECIPE, lambda error: None)
    with pytest.raises(UserError, match="MLflow is not installed") as missing:
        run_tracker.start()
    assert install_command("mlflow") in missing.value.fix


def test_a_run_sends_its_steps_and_evaluations(
    recipe: MakeRecipe, trainers: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sent.jsonl"
    monkeypatch.setenv(
        "BEFORE_TRAINER",
        "from tests.training.test_tracker import FakeIntegration, tracker; from pathlib import Path;"
        f"FakeIntegration.file = Path({str(file)!r});"
        "tracker._INTEGRATIONS['trackio'] = FakeIntegration; tracker.missing_tracker = lambda name: None",
    )
    run = create_run(recipe({"training.max_steps": 2, "training.report_to": "trackio"}))
    assert trainers.run(run) == 0 and events_of(run, Finished)
    first, *numbers, last = tracked(file)
    assert (first["run"], first["training.max_steps"]) == (run.id, 2) and last == {"ended": True}
    evaluations, steps = events_of(run, Evaluated), events_of(run, Step)
    assert [line["eval_loss"] for line in numbers if "eval_loss" in line] == [e.loss for e in evaluations]
    assert [(line["at"], line["loss"]) for line in numbers if "loss" in line] == [
        (s.step, s.loss) for s in steps
    ]
