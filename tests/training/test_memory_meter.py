"""The trainer's estimate assumes what this process really does."""

from __future__ import annotations

import pytest
import torch

from qlora_tui.recipe.schema import Recipe
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.memory_meter import MemoryMeter
from tests.memory.models import tinyllama

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("grows", [True, False])
def test_the_meter_follows_the_allocators_settings(monkeypatch: pytest.MonkeyPatch, grows: bool) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", f"expandable_segments:{grows}")
    device = ComputeDevice(torch.device("cpu"), "CPU", 1 << 34, torch.bfloat16)
    meter = MemoryMeter(Recipe(), tinyllama(), device)
    assert meter.estimate is not None and meter.estimate.execution.expandable_segments is grows
