"""A process uses one GPU, though it may see several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from qlora_tui.recipe.schema import Recipe
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.trainer import training_arguments

pytestmark = pytest.mark.slow


def test_a_model_is_not_wrapped_though_two_gpus_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device = ComputeDevice(torch.device("cuda"), "a GPU", 1 << 34, torch.bfloat16)
    model = nn.Linear(2, 2)
    stock = Trainer(model, TrainingArguments(output_dir=str(tmp_path), report_to="none"))
    ours = Trainer(model, training_arguments(Recipe(), device, 1, tmp_path))
    assert isinstance(stock._wrap_model(model), nn.DataParallel), "this is what must not happen"
    assert ours._wrap_model(model) is model
