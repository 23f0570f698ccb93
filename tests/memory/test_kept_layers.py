"""How many layers can keep their activations in the free memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.memory import Device, check_fit, estimate, trainer_execution
from qlora_tui.memory.kept_layers import KeptLayersPlan, plan_kept_layers, speedup
from qlora_tui.recipe.schema import Data, Recipe, Training
from tests.catalog.configs import config

GIB = 1 << 30
RECIPE = Recipe(data=Data(max_length=2048), training=Training(micro_batch_size=1))


@pytest.fixture(scope="module")
def llama() -> Architecture:
    return parse_architecture(config("meta-llama/Llama-3.1-8B"))


def most_layers(architecture: Architecture, gib: float, **settings: Any) -> KeptLayersPlan:
    result = plan_kept_layers(RECIPE, architecture, int(gib * GIB), **settings)
    assert result is not None
    return result


def test_more_memory_keeps_more_layers(llama: Architecture) -> None:
    counts = [most_layers(llama, gib).kept_layers for gib in (7, 10, 12, 16, 24)]
    assert counts[0] == 0 and counts[-1] == llama.layers
    assert counts == sorted(counts) and len(set(counts)) >= 4


def test_one_layer_more_would_not_fit_for_certain(llama: Architecture) -> None:
    available = 12 * GIB
    result = most_layers(llama, 12)
    assert check_fit(result.estimate, available).fits_with_margin
    execution = trainer_execution(RECIPE, Device(), llama)
    more = estimate(
        RECIPE, llama, execution=replace(execution, kept_layers=result.kept_layers + 1), device=Device()
    )
    assert not check_fit(more, available).fits_with_margin


def test_kept_layers_cost_as_much_as_without_checkpointing(llama: Architecture) -> None:
    off = estimate(replace_checkpointing("off"), llama)
    assert most_layers(llama, 80).estimate.process_bytes == pytest.approx(off.process_bytes, rel=0.01)


def test_a_retry_limits_the_layers(llama: Architecture) -> None:
    assert most_layers(llama, 24, limit=5).kept_layers == 5
    assert most_layers(llama, 24, limit=0).kept_layers == 0


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_a_recipe_that_decides_is_not_asked(llama: Architecture, checkpointing: str) -> None:
    assert plan_kept_layers(replace_checkpointing(checkpointing), llama, 80 * GIB) is None


def test_an_approximated_family_keeps_none(llama: Architecture) -> None:
    from msgspec.structs import replace as with_fields

    unknown = with_fields(llama, model_type="unheard-of")
    assert most_layers(unknown, 80).kept_layers == 0


def test_a_cpu_run_takes_half_of_the_free_memory(llama: Architecture) -> None:
    cpu = Device(kind="cpu", native_bfloat16=True)
    assert most_layers(llama, 24, device=cpu).available_bytes == 12 * GIB


def test_the_speedup_grows_with_the_layers(llama: Architecture) -> None:
    speeds = [speedup(RECIPE, llama, count) for count in range(llama.layers + 1)]
    assert speeds[0] == 1 and speeds == sorted(speeds)
    # Two products with each weight instead of three, but for the down projection.
    assert 1.25 < speeds[-1] < 1.45


def replace_checkpointing(value: Any) -> Recipe:
    return Recipe(data=RECIPE.data, training=Training(micro_batch_size=1, gradient_checkpointing=value))
