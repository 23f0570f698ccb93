"""Memory over a training step, beside the estimate that is its maximum."""

from __future__ import annotations

from itertools import groupby

import pytest

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.memory import Correction, Device, estimate
from qlora_tui.memory.estimate import LOADING, step_timeline
from qlora_tui.memory.step import PHASES, StepTrace
from qlora_tui.recipe.schema import Data, Lora, Quantization, Recipe, Training
from tests.catalog.configs import config
from tests.memory.models import qwen_7b

NAMES = ("Qwen/Qwen2.5-0.5B", "google/gemma-2-2b", "mistralai/Mixtral-8x7B-v0.1", "openai-community/gpt2")
RECIPES = {
    "default": Recipe(),
    "short": Recipe(data=Data(max_length=128)),
    "no accumulation": Recipe(training=Training(gradient_accumulation=1, optimizer="adamw")),
    "all kept": Recipe(training=Training(gradient_checkpointing="off", micro_batch_size=4)),
    "int8": Recipe(quantization=Quantization(method="int8")),
    "16 bits": Recipe(quantization=Quantization(method="none"), lora=Lora(rank=64, dropout=0.1)),
}


@pytest.mark.parametrize("device", [Device(), Device(kind="cpu")], ids=["gpu", "cpu"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_its_maximum_is_the_estimate_and_its_phase(recipe: Recipe, name: str, device: Device) -> None:
    architecture = parse_architecture(config(name))
    estimated = estimate(recipe, architecture, device=device)
    moments = step_timeline(recipe, architecture, estimated)
    fullest = max(moments, key=lambda moment: moment.total_bytes)
    assert fullest.total_bytes == estimated.process_bytes
    assert fullest.name == estimated.peak_phase
    step = max((m for m in moments if m.phase != LOADING), key=lambda moment: moment.total_bytes)
    for item in estimated.items:
        if item.key in ("activations", "checkpoints", "gradients", "adapter", "weights", "logits"):
            assert step.items[item.key] == item.bytes, item.key


def test_phases_follow_in_order_with_every_layer() -> None:
    architecture = qwen_7b()
    moments = step_timeline(Recipe(), architecture, estimate(Recipe(), architecture))
    grouped = [(phase, list(part)) for phase, part in groupby(moments, lambda moment: moment.phase)]
    assert tuple(phase for phase, _ in grouped) == PHASES
    numbers = {phase: len(part) for phase, part in grouped}
    assert numbers["forward"] == numbers["backward"] == architecture.layers
    first = next(moment for moment in moments if moment.phase == "backward")
    assert first.name == f"backward of layer {architecture.layers - 1}"
    assert all(size > 0 for moment in moments for size in moment.items.values())


def test_kept_activations_rise_in_forward_and_fall_in_backward() -> None:
    recipe = Recipe(training=Training(gradient_checkpointing="off"))
    architecture = qwen_7b()
    moments = step_timeline(recipe, architecture, estimate(recipe, architecture))
    forward = [m.total_bytes for m in moments if m.phase == "forward"]
    backward = [m.total_bytes for m in moments if m.phase == "backward"]
    assert forward == sorted(forward) and backward == sorted(backward, reverse=True)


def test_a_traced_step_has_the_traced_peak() -> None:
    architecture = qwen_7b()
    traced = StepTrace(
        parameter_bytes=1,
        adapter_bytes=1,
        forward_bytes=2 << 30,
        backward_bytes=3 << 30,
        gradient_bytes=1 << 20,
        kept_bytes=1,
    )
    estimated = estimate(Recipe(), architecture, traced=traced)
    moments = step_timeline(Recipe(), architecture, estimated, traced)
    assert max(moment.total_bytes for moment in moments) == estimated.process_bytes
    forward, backward = (next(m for m in moments if m.phase == p) for p in ("forward", "backward"))
    assert backward.total_bytes - forward.total_bytes == 1 << 30


def test_a_correction_by_past_runs_is_part_of_the_overhead() -> None:
    device = Device(correction=Correction(runs=3, factor=1.2, low=0.9, high=1.1, outside_bytes=1 << 30))
    estimated = estimate(Recipe(), qwen_7b(), device=device)
    moments = step_timeline(Recipe(), qwen_7b(), estimated)
    assert max(moment.total_bytes for moment in moments) == estimated.process_bytes
