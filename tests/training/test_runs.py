"""Whole runs: preferences, 4-bit experts, streamed layers, thinking, and early stopping."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_tui.chat.chat_sources import run_source
from qlora_tui.checksums import digest
from qlora_tui.cli.main import main
from qlora_tui.recipe.schema import Source
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import (
    DataReady,
    Evaluated,
    Finished,
    Health,
    LayersStreamed,
    SampleGenerated,
    Started,
    Step,
    StepVerified,
    ValidationCompared,
)
from qlora_tui.runs.memory_retry import RetryPlan
from qlora_tui.runs.run_summary import summarize
from qlora_tui.runs.status import read_status
from qlora_tui.training.adapter import load_best_weights
from tests.data.thinkers import SMOLLM3
from tests.support.polling import wait_for
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events, events_of, losses
from tests.training.test_preferences import write_pairs, write_rated
from tests.training.test_resume import EVERY_STEP, EXACT, interrupted_at
from tests.training.test_step_by_step import MUTANTS
from tests.training.tiny_model import make_tiny_mixture, make_tiny_model

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


LAYERS = 2
"""Of the mixture."""
KILLED_AT = 2
SETTINGS = {
    "lora.target_modules": ("all-linear", "experts.gate_up_proj", "experts.down_proj"),
    "training.learning_rate": 1e-2,
    "training.gradient_checkpointing": "on",
    **EVERY_STEP,
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_mixture(tmp_path_factory.mktemp("models") / "tiny-mixture")


def test_a_mixture_streams_resumes_and_is_exported_as_gguf(
    recipe: MakeRecipe,
    mixture: Path,
    trainers: Trainers,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("llama_cpp_py_sync")
    run = create_run(recipe({**SETTINGS, "model.id": str(mixture)}))
    assert trainers.run(run) == 0
    (verified,) = events_of(run, StepVerified)
    assert verified.agrees and not verified.replaced and verified.tokens
    expected = losses(run)
    assert expected[max(expected)] < expected[1] * 0.7
    config = json.loads((run.adapter_dir / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == 4
    again = create_run(recipe({**SETTINGS, "model.id": str(mixture), "quantization.streamed_layers": LAYERS}))
    trainer = trainers.start(again)
    wait_for(lambda: any(event.step == KILLED_AT for event in events_of(again, Step)), seconds=60)
    os.kill(trainer.pid, signal.SIGKILL)
    assert trainer.wait() == -signal.SIGKILL
    assert trainers.run(again) == 0
    assert events_of(again, Started)[-1].resumed_from_step >= KILLED_AT - 1
    assert events_of(again, LayersStreamed)[-1].streamed_layers == LAYERS
    repeated = losses(again)
    assert all(abs(repeated[step] - loss) < EXACT for step, loss in expected.items())

    arguments = ["--quant", "F16", "--compare-tokens", "50", "--json"]
    assert main(["export", "gguf", run.id, str(tmp_path / "mixture.gguf"), *arguments]) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert file["proof"]["divergence"] < 0.002 < file["proof"]["effect"]


def test_a_run_from_before_this_setting_keeps_16_bits(recipe: MakeRecipe, mixture: Path) -> None:
    run = create_run(recipe({**SETTINGS, "model.id": str(mixture)}))
    assert run.recipe().quantization.experts
    text = run.recipe_path.read_text()
    run.recipe_path.write_text(text.replace("experts = true\n", ""))
    assert not run.recipe().quantization.experts


STREAMED: dict[str, Any] = {
    "training.gradient_checkpointing": "on",
    "training.checkpoint_every": 3,
    "training.max_steps": 16,
    "training.eval_every": 16,
    "training.sample_prompts": ("what is 3",),
}


def results(run: RunDir) -> list[Any]:
    """Losses, validation losses, answers and the final adapter, its numbers as text."""
    adapter = load_file(run.adapter_dir / "adapter_model.safetensors")
    return [
        losses(run),
        [event.loss for event in events_of(run, Evaluated)],
        [event.answer for event in events_of(run, SampleGenerated)],
        {name: tensor.tolist() for name, tensor in adapter.items()},
    ]


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "deep-llama", num_hidden_layers=4)


def test_a_streamed_run_killed_and_resumed_is_the_resident_run(
    recipe: MakeRecipe, trainers: Trainers, deep_model: Path
) -> None:
    settings = {**STREAMED, "model.id": str(deep_model)}
    resident = create_run(recipe(settings))
    assert trainers.run(resident) == 0
    run = create_run(recipe({**settings, "quantization.streamed_layers": 3}))
    trainer = trainers.start(run)
    wait_for(lambda: any(event.step >= 4 for event in events_of(run, Step)), seconds=60)
    os.kill(trainer.pid, signal.SIGKILL)
    assert trainer.wait() == -signal.SIGKILL
    assert trainers.run(run) == 0, run.log_path.read_text()
    assert events_of(run, Started)[-1].resumed_from_step >= 3
    assert results(run) == results(resident)
    placed = events_of(run, LayersStreamed)[-1]
    assert (placed.streamed_layers, placed.layers) == (3, 4)
    assert 2 * placed.host_bytes == 3 * placed.slot_bytes
    assert all(event.agrees and not event.replaced for event in events_of(run, StepVerified))
    assert not [event for event in events_of(run, Health) if event.kind != "few_steps"]


def test_data_without_reasoning_trains_and_chats_without_thinking(
    recipe: MakeRecipe, trainers: Trainers, tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "thinker")
    (model / "chat_template.jinja").write_text(SMOLLM3)
    settings = {"model.id": str(model), "training.epochs": 1.0, "training.sample_prompts": ("what is 3",)}
    run = create_run(recipe(settings))
    assert trainers.run(run) == 0
    assert events_of(run, DataReady)[0].thinking == "off"
    assert (
        "Thinking: off for every row (enable_thinking), since none has reasoning." in run.log_path.read_text()
    )
    assert run_source(run).thinking == "off"
    thinking = create_run(recipe({**settings, "data.thinking": "on"}))
    assert trainers.run(thinking) == 0
    assert run_source(thinking).thinking == events_of(thinking, DataReady)[0].thinking == "on"
    assert events_of(run, DataReady)[0].data_hash != events_of(thinking, DataReady)[0].data_hash
    # Another prompt gives the random model another answer.
    asked_off, asked_on = (events_of(one, SampleGenerated)[0].answer for one in (run, thinking))
    assert asked_off != asked_on


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_stops_after_its_patience_and_keeps_the_best(recipe: MakeRecipe, trainers: Trainers) -> None:
    # At such a rate it only gets worse once it has begun to.
    settings = {"training.learning_rate": 0.1, "training.lr_scheduler": "constant", "training.epochs": 50.0}
    settings |= {"training.eval_every": 1, "training.checkpoint_every": 1, "training.keep_checkpoints": 1}
    run = create_run(recipe({**settings, "training.early_stopping": 3}))
    assert trainers.run(run) == 0
    ending = events(run)[-1]
    assert isinstance(ending, Finished)
    assert ending.checksums == digest(run.adapter_dir)
    best = [e.step for e in events_of(run, Evaluated) if e.best][-1]
    assert ending.step == best + 3 < events_of(run, DataReady)[0].total_steps
    assert "the validation loss did not improve in 3 evaluations" in ending.reason
    assert f"the adapter is from the best step, {best}" in ending.reason
    assert read_status(run).detail == ending.reason
    assert [step for step, _ in run.checkpoints()] == [best, ending.step]
    assert same_weights(run.adapter_dir, run.checkpoints_dir / f"step-{best}")
    assert not same_weights(run.adapter_dir, run.checkpoints_dir / f"step-{ending.step}")


def never_written(folder: Path) -> None:
    """As after a full disk."""


def half_deleted(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"x")


def cut_short(folder: Path) -> None:
    half_deleted(folder)
    (folder / "complete").write_text('{"adapter_model.safetensors": 2}')


@pytest.mark.parametrize("what", [never_written, half_deleted, cut_short])
def test_without_the_best_checkpoint_the_last_weights_stay(
    recipe: MakeRecipe, what: Callable[[Path], None]
) -> None:
    run: RunDir = create_run(recipe())
    what(run.checkpoints_dir / "step-4")
    # There is no model to put weights into: trying would fail.
    assert "from the last step, because the checkpoint of the best step, 4, is missing" in load_best_weights(
        run, None, 4
    )
