"""The trainer's estimate assumes what this process really does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_tui.memory import Device
from qlora_tui.paths import state_dir
from qlora_tui.recipe.schema import Data, Recipe
from qlora_tui.recipe.training_settings import Training
from qlora_tui.training import memory_meter
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.description import architecture_of
from qlora_tui.training.memory_meter import MemoryMeter
from qlora_tui.training.model import PreparedBase
from tests.catalog.configs import config
from tests.memory.models import tinyllama

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("grows", [True, False])
def test_the_meter_follows_the_allocators_settings(monkeypatch: pytest.MonkeyPatch, grows: bool) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", f"expandable_segments:{grows}")
    device = ComputeDevice(torch.device("cpu"), "CPU", 1 << 34, torch.bfloat16)
    meter = MemoryMeter(Recipe(), tinyllama(), device)
    assert meter.estimate is not None and meter.estimate.execution.expandable_segments is grows


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> MemoryMeter:
    """The meter of an 8B model on a GPU of 24 GiB, where the estimate expects Triton's kernels."""
    monkeypatch.setattr(memory_meter, "_as_estimated", lambda device: Device(capability=(8, 9), triton=True))
    monkeypatch.setattr(MemoryMeter, "free_bytes", lambda self: 24 << 30)
    device = ComputeDevice(torch.device("cpu"), "RTX 4090", 24 << 30, torch.bfloat16)
    recipe = Recipe(data=Data(max_length=2048), training=Training(micro_batch_size=1))
    return MemoryMeter(recipe, architecture_of(config("meta-llama/Llama-3.1-8B")), device)


def base(**settings: Any) -> PreparedBase:
    defaults: dict[str, Any] = {"loss": "chunked", "packed": "varlen", "attention": "flash"}
    return PreparedBase(None, Path(), reference_attention="sdpa", **{**defaults, **settings})


@pytest.mark.parametrize(
    ("settings", "triton", "kept"),
    [
        ({}, True, 32),
        ({}, False, 32),
        ({"packed": "segments"}, True, 32),
        ({"loss": "stock", "replaced": ("loss",)}, True, 32),
        ({"packed": None, "replaced": ("packed attention",)}, True, 0),
        ({"replaced": ("mlp",)}, True, 0),
    ],
)
def test_only_code_without_a_model_costs_kept_layers_and_record(
    meter: MemoryMeter, settings: dict[str, Any], triton: bool, kept: int
) -> None:
    meter.use(base(**settings), triton=triton)
    meter.set_longest_batch(1, 2048, samples=1)
    plan = meter.plan_kept_layers(None)
    assert plan is not None and plan.kept_layers == kept
    meter.record()
    assert (state_dir() / "memory.jsonl").exists() is bool(kept)


def test_the_estimate_is_that_of_the_kernels_in_use(meter: MemoryMeter) -> None:
    expected = meter.estimate
    meter.use(base(), triton=False)
    assert expected is not None and meter.estimate is not None
    assert expected.execution.triton and not meter.estimate.execution.triton
    assert meter.estimate.process_bytes > expected.process_bytes
