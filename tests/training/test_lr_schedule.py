"""The learning rate of each step, beside transformers' own schedules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from qlora_tui.recipe.schema import Recipe, Training
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.lr_schedule import SCHEDULES, create_schedule
from qlora_tui.training.trainer import training_arguments

pytestmark = pytest.mark.slow

PEAK = 2e-3


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


def rates(schedule: Any, steps: int) -> list[float]:
    """The rate of each step, and the one after the last."""
    result = []
    for _ in range(steps + 1):
        result.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return result


def of_a_run(training: Training, steps: int, folder: Path) -> list[float]:
    recipe = Recipe(training=training)
    arguments = training_arguments(recipe, find_device(recipe), steps, folder)
    return rates(create_schedule(optimizer(), arguments, steps), steps)


@pytest.mark.parametrize(
    ("settings", "name", "theirs"),
    [
        ({"lr_scheduler": "cosine"}, "cosine", {}),
        ({"lr_scheduler": "linear"}, "linear", {}),
        ({"lr_scheduler": "constant"}, "constant_with_warmup", {}),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_cycles": 3},
            "cosine_with_restarts",
            {"num_cycles": 3},
        ),
        ({"lr_scheduler": "polynomial", "lr_power": 3.0}, "polynomial", {"power": 3.0, "lr_end": 0.0}),
        (
            {"lr_scheduler": "wsd", "lr_decay_share": 0.25},
            "warmup_stable_decay",
            {"num_decay_steps": 10, "decay_type": "1-sqrt"},
        ),
    ],
)
def test_every_rate_after_warmup_is_that_of_transformers(
    settings: dict[str, Any], name: str, theirs: dict[str, Any], tmp_path: Path
) -> None:
    steps, warmup = 40, 4
    ours = of_a_run(Training(learning_rate=PEAK, warmup_ratio=0.1, **settings), steps, tmp_path)
    stock = rates(get_scheduler(name, optimizer(), warmup, steps, theirs), steps)
    assert ours[warmup:] == pytest.approx(stock[warmup:], abs=1e-12)
    # The warm-up is one step ahead, so that the first step is not wasted.
    assert ours[:warmup] == pytest.approx([*stock[1:warmup], PEAK])


def test_a_decay_longer_than_the_rest_begins_after_warmup(tmp_path: Path) -> None:
    training = Training(learning_rate=PEAK, lr_scheduler="wsd", warmup_ratio=0.5, lr_decay_share=0.9)
    falling = of_a_run(training, 10, tmp_path)[5:]
    assert falling[0] == PEAK and falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup_ratio"), [(1, 0.0), (2, 0.9), (6, 0.5)])
def test_short_runs_have_positive_finite_rates(
    schedule: Any, steps: int, warmup_ratio: float, tmp_path: Path
) -> None:
    training = Training(learning_rate=PEAK, lr_scheduler=schedule, warmup_ratio=warmup_ratio)
    of_each_step = of_a_run(training, steps, tmp_path)[:steps]
    assert all(math.isfinite(rate) and 0 < rate <= PEAK for rate in of_each_step)
