"""Runs whose layers wait in host memory train, evaluate, answer, save and resume as other runs do."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import (
    Evaluated,
    Health,
    LayersStreamed,
    SampleGenerated,
    Started,
    Step,
    StepVerified,
)
from tests.support.polling import wait_for
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of, losses
from tests.training.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "training.gradient_checkpointing": "on",
    "training.checkpoint_every": 5,
    "training.max_steps": 24,
    "training.eval_every": 24,
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
    settings = {**SETTINGS, "model.id": str(deep_model)}
    resident = create_run(recipe(settings))
    assert trainers.run(resident) == 0
    run = create_run(recipe({**settings, "quantization.streamed_layers": 3}))
    trainer = trainers.start(run)
    wait_for(lambda: any(event.step >= 7 for event in events_of(run, Step)), seconds=60)
    os.kill(trainer.pid, signal.SIGKILL)
    assert trainer.wait() == -signal.SIGKILL
    assert trainers.run(run) == 0, run.log_path.read_text()
    assert events_of(run, Started)[-1].resumed_from_step >= 5
    assert results(run) == results(resident)
    placed = events_of(run, LayersStreamed)[-1]
    assert (placed.streamed_layers, placed.layers) == (3, 4)
    assert 2 * placed.host_bytes == 3 * placed.slot_bytes
    assert all(event.agrees and not event.replaced for event in events_of(run, StepVerified))
    assert not [event for event in events_of(run, Health) if event.kind != "few_steps"]
