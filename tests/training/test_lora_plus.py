"""LoRA+ beside peft's own optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from qlora_tui.recipe.schema import Recipe, Training
from qlora_tui.training.batches import StepPlan
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.step_dataset import StepDataset
from qlora_tui.training.trainer import RunTrainer, training_arguments

pytestmark = pytest.mark.slow

RATE, RATIO, DECAY = 1e-3, 8.0, 0.1


@pytest.fixture(scope="module")
def adapted(tiny_model: Path) -> Any:
    """A model with matrices, DoRA's magnitudes and trained token rows."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    targets = ["q_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, use_dora=True, trainable_token_indices=[3])
    return get_peft_model(model, config)


def run_trainer(model: Any, folder: Path, optimizer: Any, **methods: Any) -> RunTrainer:
    training = Training(learning_rate=RATE, weight_decay=DECAY, optimizer=optimizer, **methods)
    recipe = Recipe(training=training)
    arguments = training_arguments(recipe, find_device(recipe), 4, folder)
    samples: Any = ()
    steps = StepDataset(StepPlan((), 0, 0), samples, micro_batch=1, padding_free=True, pad_id=0)
    return RunTrainer(model, arguments, steps, training)


def groups(model: Any, optimizer: Any) -> list[tuple[set[str], float, float]]:
    """(names, rate, weight decay) of each group with parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        ({names[p] for p in group["params"]}, group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        if group["params"]
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_lora_plus_has_the_groups_of_peft(adapted: Any, tmp_path: Path, optimizer: str) -> None:
    import torch
    from peft.optimizers import create_loraplus_optimizer

    trainer = run_trainer(adapted, tmp_path, optimizer, lora_plus_ratio=RATIO)
    trainer.create_optimizer_and_scheduler(4)
    theirs = create_loraplus_optimizer(
        adapted, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY
    )
    ours = groups(adapted, trainer.optimizer)
    assert ours == groups(adapted, theirs)
    (a_names, a_rate, _), (b_names, b_rate, _) = ours
    assert a_rate == RATE and b_rate == RATIO * RATE
    assert all("lora_A" in name or "token_adapter" in name for name in a_names)
    assert all("lora_B" in name or "magnitude" in name for name in b_names)


def test_a_changed_rate_keeps_the_ratio(adapted: Any, tmp_path: Path) -> None:
    trainer = run_trainer(adapted, tmp_path, "adamw", lora_plus_ratio=RATIO)
    trainer.create_optimizer_and_scheduler(4)
    trainer.state.max_steps = 4
    trainer.set_learning_rate(RATE / 10)
    rates = [rate for _, rate, _ in groups(adapted, trainer.optimizer)]
    assert rates == pytest.approx([RATE / 10, RATIO * RATE / 10])


def test_without_a_ratio_all_matrices_share_one_rate(adapted: Any, tmp_path: Path) -> None:
    trainer = run_trainer(adapted, tmp_path, "adamw")
    trainer.create_optimizer()
    assert {rate for _, rate, _ in groups(adapted, trainer.optimizer)} == {RATE}
