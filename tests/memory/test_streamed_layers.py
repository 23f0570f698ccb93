"""What a base takes whose layers wait in host memory, and how much slower it trains."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.memory import Device, cheapest_changes, estimate, plan_kept_layers, trainer_execution
from qlora_tui.memory.calibration import TransferSpeed, measured_speed, record_speed, speed_file
from qlora_tui.memory.estimate import step_timeline
from qlora_tui.memory.step_choice import copied_bytes, describe_host_memory, slowdown
from qlora_tui.memory.weights import streamed_indices, streamed_weights
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Recipe
from qlora_tui.recipe.training_settings import Training
from tests.catalog.configs import config

GIB = 1 << 30
RECIPE = Recipe(data=Data(max_length=2048), training=Training(micro_batch_size=1))
SPEED = TransferSpeed(at=0.0, bytes_per_s=12e9, flops_per_s=60e12)
WEIGHTS = ("weights", "scales", "slots")


@pytest.fixture(scope="module")
def llama() -> Architecture:
    return parse_architecture(config("meta-llama/Llama-3.1-8B"))


def streaming(count: int, recipe: Recipe = RECIPE) -> Recipe:
    return replace_setting(recipe, "quantization.streamed_layers", count)


def test_streamed_layers_are_at_equal_distances() -> None:
    assert streamed_indices(8, 4) == (1, 3, 5, 7)
    assert streamed_indices(5, 5) == streamed_indices(5, 99) == (0, 1, 2, 3, 4)
    assert streamed_indices(32, 0) == ()


@pytest.mark.parametrize("count", [3, 16, 32])
def test_two_buffers_replace_the_streamed_layers(llama: Architecture, count: int) -> None:
    resident, streamed = estimate(RECIPE, llama), estimate(streaming(count), llama)
    a_layer = streamed.bytes_of("slots") / 2
    before, now = (sum(result.bytes_of(key) for key in WEIGHTS) for result in (resident, streamed))
    assert before - now == pytest.approx((count - 2) * a_layer, rel=0.01)
    assert resident.allocated_bytes - streamed.allocated_bytes == pytest.approx(
        (count - 2) * a_layer, rel=0.02
    )
    frozen = sum(resident.bytes_of(key) for key in ("weights", "scales", "embedding", "head", "norms"))
    assert streamed.host_bytes == pytest.approx(frozen, rel=0.01) and not resident.host_bytes


def test_host_memory_of_a_cpu_is_its_only_memory(llama: Architecture) -> None:
    cpu = Device(kind="cpu")
    resident, streamed = (estimate(recipe, llama, device=cpu) for recipe in (RECIPE, streaming(8)))
    assert not streamed.host_bytes
    assert streamed.bytes_of("weights") == resident.bytes_of("weights")
    assert streamed.process_bytes - resident.process_bytes == streamed.bytes_of("slots")


@pytest.mark.parametrize("checkpointing", ["on", "offload"])
def test_every_moment_of_the_timeline_is_within_the_estimate(llama: Architecture, checkpointing: str) -> None:
    recipe = replace_setting(streaming(32), "training.gradient_checkpointing", checkpointing)
    estimated = estimate(recipe, llama)
    moments = step_timeline(recipe, llama, estimated)
    assert max(moment.total_bytes for moment in moments) == estimated.process_bytes
    assert {moment.phase for moment in moments if "slots" in moment.items} == {m.phase for m in moments}


def test_streamed_layers_leave_no_activations_to_plan(llama: Architecture) -> None:
    assert plan_kept_layers(RECIPE, llama, 80 * GIB) is not None
    assert plan_kept_layers(streaming(8), llama, 80 * GIB) is None


def test_each_layer_is_copied_twice_but_for_two(llama: Architecture) -> None:
    execution = trainer_execution(RECIPE, Device(), llama)
    weights = streamed_weights(streaming(10), llama, execution)
    assert weights is not None
    assert copied_bytes(streaming(10), llama, execution) == pytest.approx(16 * weights.slot_bytes / 2)
    assert copied_bytes(streaming(2), llama, execution) == copied_bytes(RECIPE, llama, execution) == 0


def test_a_step_takes_the_longer_of_copies_and_products(llama: Architecture) -> None:
    execution = trainer_execution(RECIPE, Device(), llama)

    def factor(recipe: Recipe, **speed: float) -> float:
        return slowdown(recipe, llama, execution, TransferSpeed(**{"at": 0.0, **speed}))

    slow = factor(streaming(32), bytes_per_s=1e9, flops_per_s=60e12)
    assert slow > 2
    assert factor(streaming(32), bytes_per_s=5e8, flops_per_s=60e12) == pytest.approx(2 * slow)
    longer = replace_setting(streaming(32), "data.max_length", 4096)
    assert factor(longer, bytes_per_s=1e9, flops_per_s=60e12) < 0.6 * slow
    assert factor(streaming(32), bytes_per_s=1e15, flops_per_s=60e12) == 1


def replace_speed(bytes_per_s: float) -> TransferSpeed:
    return TransferSpeed(at=0.0, bytes_per_s=bytes_per_s, flops_per_s=SPEED.flops_per_s)


def test_streaming_is_offered_with_its_cost(llama: Architecture) -> None:
    device = Device(speed=SPEED, host_bytes=32 * GIB)
    available = 5 * GIB
    offers = cheapest_changes(RECIPE, llama, available, device=device)
    (offer,) = [each for each in offers if "quantization.streamed_layers" in each.settings]
    assert offer.label.endswith("of 32 layers from host memory")
    assert offer.cost == "about as fast" or offer.cost.endswith("× slower")
    count = offer.settings["quantization.streamed_layers"]
    fewer = estimate(streaming(count - 2), llama, device=device)
    assert offer.fits and fewer.band.high_bytes > available


@pytest.mark.parametrize(
    "change", [{"host_bytes": 4 * GIB}, {"kind": "cpu", "host_bytes": None}], ids=["little", "cpu"]
)
def test_streaming_is_not_offered_without_host_memory(llama: Architecture, change: dict[str, object]) -> None:
    device = replace(Device(), **change)  # type: ignore[arg-type]  # fields of Device
    offers = cheapest_changes(RECIPE, llama, 5 * GIB, device=device)
    assert not any("quantization.streamed_layers" in each.settings for each in offers)


def test_a_measured_speed_is_that_of_its_gpu() -> None:
    assert measured_speed("A") is None
    record_speed("A", SPEED)
    record_speed("B", replace_speed(1.0))
    assert measured_speed("A") == SPEED and measured_speed("C") is None
    speed_file().write_bytes(b'{"A": ')
    assert measured_speed("A") is None


def test_offloaded_inputs_leave_two_on_the_gpu(llama: Architecture) -> None:
    long = replace_setting(RECIPE, "data.max_length", 16_384)
    on, offload = (
        estimate(replace_setting(long, "training.gradient_checkpointing", value), llama)
        for value in ("on", "offload")
    )
    hidden = 16_384 * 4096 * 2
    assert on.bytes_of("checkpoints") == 32 * hidden and offload.bytes_of("checkpoints") == 2 * hidden
    assert on.allocated_bytes - offload.allocated_bytes == 30 * hidden
    assert on.reserved_bytes - offload.reserved_bytes == pytest.approx(30 * hidden, rel=0.02)
    assert (on.host_bytes, offload.host_bytes) == (0, 32 * hidden)


def test_offloaded_inputs_are_copied_both_ways(llama: Architecture) -> None:
    recipe = replace_setting(RECIPE, "training.gradient_checkpointing", "offload")
    execution = trainer_execution(recipe, Device(), llama)
    assert copied_bytes(recipe, llama, execution) == 2 * 32 * 2048 * 4096 * 2
    pairs = replace_setting(recipe, "data.preferences", "dpo")
    assert copied_bytes(pairs, llama, execution) == 2 * 2 * 32 * 2048 * 4096 * 2
    assert slowdown(recipe, llama, execution, SPEED) == 1
    words = describe_host_memory(recipe, llama, Device(speed=SPEED))
    assert words == "Layer inputs take 0.5 GiB of host memory. A step is about as fast."
    on_cpu = trainer_execution(recipe, Device(kind="cpu"), llama)
    assert not on_cpu.offloads_inputs and on_cpu.checkpointing
