"""A run on a mixture with 4-bit experts and adapters on them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from qlora_tui.cli.main import main
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import LayersStreamed, Started, Step, StepVerified
from tests.support.polling import wait_for
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of, losses
from tests.training.test_resume import EVERY_STEP, EXACT
from tests.training.tiny_model import make_tiny_mixture

pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.slow

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
