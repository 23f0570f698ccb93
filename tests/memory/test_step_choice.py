"""How many layers can keep their activations in the free memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.described import describe
from qlora_tui.memory import Device, check_fit, estimate, trainer_execution
from qlora_tui.memory.calibration import TransferSpeed
from qlora_tui.memory.execution import LEAN_OPTIMIZER
from qlora_tui.memory.step_choice import (
    KeptLayersPlan,
    StepChoice,
    choose_step,
    plan_kept_layers,
    products_per_token,
    step_seconds,
)
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Recipe
from qlora_tui.recipe.training_settings import Training
from tests.catalog.configs import config

pytestmark = pytest.mark.slow

GIB = 1 << 30
RECIPE = Recipe(data=Data(max_length=2048), training=Training(micro_batch_size=1))


@pytest.fixture
def llama() -> Architecture:
    return describe(config("meta-llama/Llama-3.1-8B"))


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


def test_a_model_whose_step_is_uncertain_keeps_none() -> None:
    hybrid = describe(config("LiquidAI/LFM2-350M"))
    assert most_layers(hybrid, 80).kept_layers == 0


def test_a_cpu_run_takes_half_of_the_free_memory(llama: Architecture) -> None:
    cpu = Device(kind="cpu", native_bfloat16=True)
    assert most_layers(llama, 24, device=cpu).available_bytes == 12 * GIB


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_step_is_faster_with_more_kept_layers(llama: Architecture, kind: Any) -> None:
    times = [step_seconds(RECIPE, llama, Device(kind=kind), count) for count in range(llama.layers + 1)]
    assert times == sorted(times, reverse=True)
    # Two products with each weight instead of three, but for the down projection.
    assert 1.25 < times[0] / times[-1] < 1.45


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize(("gib", "kept"), [(12, 16), (16, 32), (24, 32)])
def test_an_8b_model_keeps_layers_with_any_kernels(
    llama: Architecture, gib: int, kept: int, triton: bool
) -> None:
    free = int(gib * 0.95 * GIB)
    choice = choose_step(RECIPE, llama, free, device=Device(triton=triton))
    assert abs(choice.kept_layers - kept) <= 2


def choice_of(model: str, gib: float, length: int = 1024, **settings: Any) -> StepChoice:
    device = settings.pop("device", Device())
    recipe = Recipe(data=Data(max_length=length), training=Training(**settings))
    return choose_step(recipe, describe(config(model)), int(gib * GIB), device=device)


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.1-8B"])
@pytest.mark.parametrize(("rows", "accumulation"), [(1, 8), (2, 3), (1, 7)])
def test_more_memory_is_never_slower_and_keeps_the_rows_of_a_step(
    model: str, rows: int, accumulation: int
) -> None:
    choices = [
        choice_of(model, gib, micro_batch_size=rows, gradient_accumulation=accumulation)
        for gib in (8, 12, 16, 24, 48)
    ]
    assert {choice.recipe.effective_batch for choice in choices} == {rows * accumulation}
    assert all(choice.recipe.training.micro_batch_size >= rows for choice in choices)
    speeds = [choice.speedup for choice in choices]
    assert speeds == sorted(speeds)
    assert all(
        check_fit(choice.estimate, int(gib * GIB)).fits_with_margin
        for choice, gib in zip(choices[1:], (12, 16, 24, 48), strict=True)
    )


def test_a_small_model_takes_more_rows_and_full_states() -> None:
    training = choice_of("Qwen/Qwen2.5-0.5B", 12).recipe.training
    assert training.micro_batch_size > 1 and training.optimizer == "adamw"


@pytest.mark.parametrize(
    ("gib", "settings"),
    [
        (7, {}),
        (24, {"auto_micro_batch": False, "optimizer": LEAN_OPTIMIZER}),
        (24, {"device": Device(kind="cpu", native_bfloat16=True), "optimizer": LEAN_OPTIMIZER}),
    ],
    ids=["no memory", "nothing left open", "a CPU"],
)
def test_otherwise_a_step_stays_as_the_recipe_has_it(gib: float, settings: dict[str, Any]) -> None:
    training = choice_of("meta-llama/Llama-3.1-8B", gib, **settings).recipe.training
    assert (training.micro_batch_size, training.optimizer) == (1, LEAN_OPTIMIZER)


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-1.5B", "meta-llama/Llama-3.1-8B"])
def test_no_process_waits_for_the_others(model: str, processes: int) -> None:
    recipe = Recipe(data=Data(max_length=1024), training=Training(gpus=processes))
    choice = choose_step(recipe, describe(config(model)), 80 * GIB)
    assert choice.recipe.training.gradient_accumulation % processes == 0


def test_more_rows_are_worth_it_where_launching_or_unpacking_takes_long() -> None:
    def rows(model: str, **changes: Any) -> int:
        recipe = Recipe(data=Data(max_length=512), training=Training(gradient_accumulation=64))
        recipe = replace_setting(recipe, "quantization.method", changes.get("method", "nf4"))
        speed = TransferSpeed(at=0, bytes_per_s=1e10, flops_per_s=changes.get("flops", 6e13))
        device = Device(triton=True, speed=speed)
        choice = choose_step(recipe, describe(config(model)), 200 * GIB, device=device)
        return choice.recipe.training.micro_batch_size

    fast = rows("Qwen/Qwen2.5-0.5B", method="none", flops=2e14)
    slow = rows("Qwen/Qwen2.5-0.5B", method="none", flops=2e12)
    assert fast > slow == 1
    assert rows("meta-llama/Llama-3.1-8B") > rows("meta-llama/Llama-3.1-8B", method="none")


def test_the_free_memory_that_is_named_is_enough() -> None:
    choice = choice_of("meta-llama/Llama-3.1-8B", 24)
    again = choice_of("meta-llama/Llama-3.1-8B", choice.least_free_bytes / GIB + 0.01)
    less = choice_of("meta-llama/Llama-3.1-8B", choice.least_free_bytes / GIB - 0.1)
    assert again.recipe == choice.recipe and less.recipe != choice.recipe


def test_a_mixture_computes_the_experts_of_a_token() -> None:
    mixtral = describe(config("mistralai/Mixtral-8x7B-v0.1"))
    once, _ = products_per_token(RECIPE, mixtral)
    # 12.9 billion active parameters, with their gradients' products (Mixtral's paper).
    assert 2 * 12e9 < once < 2 * 16e9


def test_many_rows_in_a_step_are_tried_in_no_time() -> None:
    settings = {"micro_batch_size": 4096, "gradient_accumulation": 65536}
    assert choice_of("Qwen/Qwen2.5-0.5B", 8, **settings).recipe.effective_batch == 4096 * 65536


def test_without_optimizer_states_decided_the_least_is_estimated(llama: Architecture) -> None:
    lean = Recipe(training=Training(optimizer=LEAN_OPTIMIZER))
    assert estimate(Recipe(), llama).process_bytes == estimate(lean, llama).process_bytes


def replace_checkpointing(value: Any) -> Recipe:
    return Recipe(data=RECIPE.data, training=Training(micro_batch_size=1, gradient_checkpointing=value))
