"""Every optimizer: what its states take, and that a checkpoint holds all of them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from qlora_tui.gpu import wsl
from qlora_tui.memory.execution import Device, trainer_execution
from qlora_tui.memory.static_memory import state_sizes
from qlora_tui.recipe.schema import Recipe, Training
from qlora_tui.training.optimizers import OPTIMIZERS
from qlora_tui.training.trainer import RunTrainer
from tests.training.test_lora_plus import run_trainer

pytestmark = pytest.mark.slow


def new_trainer(tiny_model: Path, folder: Path, optimizer: str, **settings: Any) -> RunTrainer:
    """A trainer of an adapter with tensors from 1,024 to 8,192 elements, with its optimizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=64, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 16})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    trainer = run_trainer(model, folder, optimizer, **settings)
    trainer.create_optimizer_and_scheduler(4)
    return trainer


def trained(trainer: RunTrainer) -> list[torch.Tensor]:
    model: Any = trainer.model
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(trainer: RunTrainer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(trainer):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer: Any = trainer.optimizer
    optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_states_take_what_the_estimate_says(tiny_model: Path, tmp_path: Path, optimizer: Any) -> None:
    trainer = new_trainer(tiny_model, tmp_path, optimizer)
    step(trainer, 1)
    execution = trainer_execution(Recipe(training=Training(optimizer=optimizer)), Device(kind="cpu"))
    states: Any = trainer.optimizer
    for parameter in trained(trainer):
        state = states.state[parameter].items()
        # bitsandbytes' code tables are shared, and torch counts steps.
        sizes = [x.nbytes for name, x in state if torch.is_tensor(x) and name[:4] not in ("qmap", "step")]
        assert sorted(sizes) == sorted(state_sizes(tuple(parameter.shape), execution))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_continues_each_optimizer_exactly(
    tiny_model: Path, tmp_path: Path, optimizer: str
) -> None:
    first = new_trainer(tiny_model, tmp_path, optimizer, lora_plus_ratio=2.0)
    step(first, 1)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    first.save_checkpoint_files(folder)
    second = new_trainer(tiny_model, tmp_path, optimizer, lora_plus_ratio=2.0)
    second._load_from_checkpoint(str(folder))
    second._load_optimizer_and_scheduler(str(folder))
    for trainer in (first, second):
        step(trainer, 2)
    pairs = list(zip(trained(first), trained(second), strict=True))
    assert all(torch.equal(ours, again) for ours, again in pairs)
    # Without the first step's states the second differs.
    third = new_trainer(tiny_model, tmp_path, optimizer, lora_plus_ratio=2.0)
    third._load_from_checkpoint(str(folder))
    step(third, 2)
    assert not all(
        torch.equal(ours, other) for ours, other in zip(trained(first), trained(third), strict=True)
    )


@pytest.mark.parametrize(
    ("case", "exit_code", "states"),
    [("too_early", -signal.SIGSEGV, ""), ("reset", 0, "[0, 0]"), ("save", 0, "[3, 3]")],
)
def test_paged_states_are_touched_once_the_gpu_is_done(case: str, exit_code: int, states: str) -> None:
    command = [sys.executable, "-m", "tests.training.managed_states", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (exit_code, states), done.stderr[-2000:]


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_an_optimizer_pages_no_states_on_wsl2(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any, ratio: float
) -> None:
    def pages() -> bool:
        trainer: Any = new_trainer(tiny_model, tmp_path, optimizer, lora_plus_ratio=ratio)
        return bool(trainer.optimizer.is_paged)

    assert pages()
    (tmp_path / "osrelease").write_text("5.15.153.1-microsoft-standard-WSL2")
    monkeypatch.setattr(wsl, "_KERNEL_RELEASE", tmp_path / "osrelease")
    assert not pages()
