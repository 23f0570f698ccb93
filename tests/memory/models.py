"""Configs of real models, as far as their shapes go."""

from __future__ import annotations

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.described import describe
from qlora_tui.memory.allocator import Pool
from qlora_tui.memory.execution import Device, ExecutionConfig
from qlora_tui.memory.recording import StepTrace
from qlora_tui.memory.step import Moment
from qlora_tui.memory.traces import NO_TRACES
from qlora_tui.recipe.schema import Recipe
from tests.catalog.configs import config


def tinyllama() -> Architecture:
    return describe(config("TinyLlama/TinyLlama-1.1B-Chat-v1.0"))


def qwen_7b() -> Architecture:
    return describe(config("Qwen/Qwen2.5-7B"))


def traced_peaks(forward_bytes: int, backward_bytes: int) -> StepTrace:
    """Return a trace with these peaks and 1 GiB of weights, whose allocator reserves another GiB."""
    peak = max(forward_bytes, backward_bytes) + (1 << 30)
    return StepTrace(
        transformers="5.0",
        resident={"weights": 1 << 30},
        moments=(
            Moment("forward", "forward of layer 0", {"activations": forward_bytes}),
            Moment("loss", "loss forward", {"logits": 1 << 20}),
            Moment("backward", "backward of layer 0", {"activations": backward_bytes}),
        ),
        pool=Pool(peak, peak + (1 << 30)),
    )


def device_with_trace(
    recipe: Recipe, architecture: Architecture, execution: ExecutionConfig, traced: StepTrace
) -> Device:
    """Return a device for which this step was traced."""
    return Device(traces=NO_TRACES.with_step(recipe, architecture, execution, traced))
