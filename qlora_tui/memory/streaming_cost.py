"""How much slower a run is with streamed layers or offloaded inputs, from measured speeds and its arithmetic.

Copies run beside the computation, so a step takes the longer of the two. Of S streamed layers, a micro-batch
copies each twice, forward and backward, but for the two that are still in the buffers at either turn:
2 (S - 2) copies.
"""

from __future__ import annotations

from dataclasses import replace

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.formatting import format_gib
from qlora_tui.memory.execution import Device, ExecutionConfig, trainer_execution
from qlora_tui.memory.parameter_memory import frozen_weights
from qlora_tui.memory.step import residual_itemsize
from qlora_tui.memory.step_choice import products_per_token
from qlora_tui.memory.streamed_layers import SLOTS, streamed_weights
from qlora_tui.memory.transfer_speed import TransferSpeed
from qlora_tui.recipe.schema import Recipe

_FLOPS_PER_PRODUCT = 2
"""A multiplication and an addition."""
_PASSES = 2
"""Times that a layer is needed in a micro-batch: forward, and recomputation with backward."""
_NOTICEABLE = 1.05


def copied_bytes(recipe: Recipe, architecture: Architecture, execution: ExecutionConfig) -> int:
    """Return the bytes that a micro-batch copies: streamed layers, and offloaded inputs twice."""
    size = _PASSES * _input_bytes(recipe, architecture, execution) if execution.offloads_inputs else 0
    streamed = streamed_weights(recipe, architecture, replace(execution, kept_layers=0))
    if streamed is not None:
        count = len(streamed.indices)
        size += _PASSES * max(0, count - SLOTS) * streamed.host_bytes // count
    return size


def _input_bytes(recipe: Recipe, architecture: Architecture, execution: ExecutionConfig) -> int:
    """Return the bytes of the inputs of all layers in a micro-batch."""
    width = architecture.hidden_size * residual_itemsize(execution)
    return architecture.layers * _tokens(recipe) * width


def _tokens(recipe: Recipe) -> int:
    return recipe.training.micro_batch_size * recipe.data.max_length


def slowdown(
    recipe: Recipe, architecture: Architecture, execution: ExecutionConfig, speed: TransferSpeed
) -> float:
    """Return the time of a step with streamed layers, relative to one with all of them on the device."""
    tokens = _tokens(recipe)
    once, again = products_per_token(recipe, architecture)
    flops = _FLOPS_PER_PRODUCT * tokens * (once + architecture.layers * again)
    compute_s = flops / speed.flops_per_s
    copy_s = copied_bytes(recipe, architecture, execution) / speed.bytes_per_s
    return max(copy_s, compute_s) / compute_s


def describe_slowdown(
    recipe: Recipe, architecture: Architecture, execution: ExecutionConfig, speed: TransferSpeed | None
) -> str:
    """Describe what streaming costs: ``about 1.6× slower``, or what measures it."""
    if speed is None:
        return "slower: `qlora-tui doctor` measures how much"
    factor = slowdown(recipe, architecture, execution, speed)
    return f"about {factor:.1f}× slower" if factor >= _NOTICEABLE else "about as fast"


def describe_host_memory(recipe: Recipe, architecture: Architecture, device: Device) -> str:
    """Describe what a recipe keeps in host memory beside a GPU, and its cost; empty where it keeps nothing.

    ``20 of 32 layers are streamed: 4.9 GiB of host memory hold the base. A step is about 1.6× slower.``
    """
    execution = trainer_execution(recipe, device, architecture)
    streamed = streamed_weights(recipe, architecture, execution)
    sentences = []
    if streamed is not None and device.kind == "cuda":
        base = frozen_weights(recipe, architecture, execution).total_bytes
        layers = f"{len(streamed.indices)} of {architecture.layers} layers"
        sentences.append(f"{layers} are streamed: {format_gib(base)} GiB of host memory hold the base.")
    if execution.offloads_inputs:
        size = _input_bytes(recipe, architecture, execution)
        sentences.append(f"Layer inputs take {format_gib(size)} GiB of host memory.")
    if not sentences:
        return ""
    cost = describe_slowdown(recipe, architecture, execution, device.speed)
    return " ".join((*sentences, f"A step is {cost}."))
