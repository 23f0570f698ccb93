"""What a run does with free memory: more rows at a time, faster optimizer states, fewer layers recomputed.

A recipe is estimated with the least that it needs: every layer recomputed, and with ``optimizer = "auto"``
the smallest states. What is free beyond that buys speed:

* With ``gradient_checkpointing = "auto"`` only as many layers are recomputed as must be, which otherwise
  makes a step about a third slower. The layers that keep their activations are the last ones: their backward
  comes first, so that their memory is free again when the others are recomputed.
* With ``auto_micro_batch`` more rows pass at a time, and a step has fewer passes over the same rows.
* With ``optimizer = "auto"`` AdamW's states are in 32 bits, in one kernel, instead of 8 bits and paged.

All three compete for the same memory, so the fastest combination is chosen by the predicted time of a step.
The trainer chooses rows and optimizer before it loads the model, and layers for its longest batch. After an
out-of-memory error ``runs.retry`` lowers both.

How much slower streamed layers or offloaded inputs make a run follows from the same times: copies run during
the computation, so a step takes the longer of the two. Of S streamed layers, a micro-batch
copies each twice, forward and backward, but for the two that are still in the buffers at either turn:
2 (S - 2) copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt

from msgspec import structs

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.formatting import format_gib
from qlora_tui.memory.calibration import TransferSpeed
from qlora_tui.memory.estimate import TIGHT_SHARE, Estimate, check_fit, estimate
from qlora_tui.memory.execution import LEAN_OPTIMIZER, Device, ExecutionConfig, trainer_execution
from qlora_tui.memory.weights import SLOTS, frozen_weights, streamed_weights
from qlora_tui.recipe.schema import Recipe, RecipeOptimizer

CPU_SHARE = 0.5
"""Share of the free memory of a machine without a GPU that a run may take: other programs run there too."""
_ATTENTION_BACKWARD = 2.5
"""FLOPs of attention's backward relative to its forward: five matrix products instead of two, one of which
recomputes the scores (FlashAttention-2, section 3.1)."""


_MULTIPLICATIONS_PER_S = 30e12
"""Speed of a GPU that was not measured: between an RTX 3060 (about 12e12) and an RTX 4090 (about 70e12), as
calculated from their specifications."""
_LAUNCH_S = 4e-3
"""Time in which a CPU launches the kernels of a recomputed layer for one micro-batch, however few tokens it
has: calculated for a desktop, from 7.2 ms on a slow server."""
_UNPACK_S = 4e-12
"""Time to dequantize a 4-bit weight: 2.5 bytes read and written, at 0.6 TB/s (calculated)."""
_LEAN_TENSOR_S = 8e-5
"""Time that bitsandbytes' optimizers wait for the GPU after each tensor (calculated: 30 to 45 ms for 448)."""
_FUSED_OPTIMIZER_S = 1e-3
_NOTICEABLE = 1.01
"""How much faster more rows at a time must be to be worth their memory."""


@dataclass(frozen=True)
class StepChoice:
    """What a run does with the memory that is free."""

    given: Recipe
    recipe: Recipe
    """``given`` with the chosen rows at a time, accumulation and optimizer."""
    kept: KeptLayersPlan | None
    """None if the recipe does not leave open which layers are recomputed."""
    estimate: Estimate
    """Memory of the run."""
    speedup: float
    """Predicted speed relative to the recipe with nothing but what it needs: 1.2 is 20 % faster."""

    @property
    def least_free_bytes(self) -> int:
        """Free memory from which on this is chosen."""
        share = CPU_SHARE if self.estimate.execution.device == "cpu" else 1
        return int(self.estimate.band.high_bytes / (1 - TIGHT_SHARE) / share)

    @property
    def kept_layers(self) -> int:
        """Layers that keep their activations although the recipe would allow to recompute them."""
        return self.kept.kept_layers if self.kept else 0


@dataclass(frozen=True)
class KeptLayersPlan:
    """How many layers keep their activations."""

    kept_layers: int
    total_layers: int
    """Layers of the model."""
    available_bytes: int
    """Memory that the run may take."""
    estimate: Estimate
    """Memory of the run with them."""


def choose_step(
    recipe: Recipe,
    architecture: Architecture,
    free_bytes: int,
    *,
    device: Device | None = None,
) -> StepChoice:
    """Return the fastest of what the recipe leaves open and the memory allows.

    Only what leaves 5 % of the memory free at the upper end of the estimate's uncertainty range is chosen;
    without such a choice, the recipe with the least memory. Nothing is chosen in a family whose layers the
    estimate only approximates, nor with streamed layers: a run that lacks memory for its weights saves it.

    Args:
        free_bytes: memory of the device that nothing else uses, what this run already holds included.

    Raises:
        UserError: the estimate does not support the model.
    """
    device = device or Device()
    least = with_optimizer(recipe, LEAN_OPTIMIZER)
    available = _available(free_bytes, device)
    before = step_seconds(least, architecture, device)

    def chosen(candidate: Recipe) -> StepChoice:
        kept = plan_kept_layers(candidate, architecture, free_bytes, device=device)
        result = kept.estimate if kept else estimate(candidate, architecture, device=device)
        layers = kept.kept_layers if kept else 0
        after = step_seconds(candidate, architecture, device, layers)
        return StepChoice(recipe, candidate, kept, result, before / after)

    best = chosen(least)
    if recipe.quantization.streamed_layers or not best.estimate.exact:
        return best
    optimizers = [least.training.optimizer]
    if recipe.training.optimizer == "auto":
        optimizers.append("adamw")
    for rows in _micro_batches(recipe, device):
        choices = [chosen(with_optimizer(with_micro_batch(recipe, rows), name)) for name in optimizers]
        fitting = [choice for choice in choices if check_fit(choice.estimate, available).fits_with_margin]
        if not fitting:
            break
        fastest = max(fitting, key=lambda choice: choice.speedup)
        least_rows = rows == recipe.training.micro_batch_size
        if fastest.speedup > best.speedup * (1 if least_rows else _NOTICEABLE):
            best = fastest
    return best


def _micro_batches(recipe: Recipe, device: Device) -> list[int]:
    """Return the micro-batch sizes to try, the recipe's first: the larger divisors of a step's rows follow.

    On a CPU a step computes no faster with more rows.
    """
    least, rows = recipe.training.micro_batch_size, recipe.effective_batch
    if device.kind == "cpu" or not recipe.training.auto_micro_batch:
        return [least]
    small = [size for size in range(1, isqrt(rows) + 1) if rows % size == 0]
    sizes = sorted({*small, *(rows // size for size in small)})
    return [least, *(size for size in sizes if size > least)]


def with_micro_batch(recipe: Recipe, rows: int) -> Recipe:
    """Return the recipe with so many rows at a time and as many rows in a step as before."""
    accumulation = recipe.effective_batch // rows
    training = structs.replace(
        recipe.training, micro_batch_size=rows, gradient_accumulation=accumulation, auto_micro_batch=False
    )
    return structs.replace(recipe, training=training)


def with_optimizer(recipe: Recipe, optimizer: RecipeOptimizer) -> Recipe:
    """Return the recipe with this optimizer in place of ``auto``."""
    if recipe.training.optimizer != "auto":
        return recipe
    return structs.replace(recipe, training=structs.replace(recipe.training, optimizer=optimizer))


def _available(free_bytes: int, device: Device) -> int:
    return int(free_bytes * CPU_SHARE) if device.kind == "cpu" else free_bytes


def plan_kept_layers(
    recipe: Recipe,
    architecture: Architecture,
    free_bytes: int,
    *,
    device: Device | None = None,
    execution: ExecutionConfig | None = None,
    limit: int | None = None,
) -> KeptLayersPlan | None:
    """Return how many layers can keep their activations; None unless ``gradient_checkpointing`` is ``auto``.

    Also None with streamed layers: a run that lacks memory for its weights recomputes every layer.

    The most that still fit at the upper end of the estimate's uncertainty range. No layer is kept in a family
    whose layers the estimate only approximates.

    Args:
        free_bytes: memory of the device that nothing else uses, what this run already holds included.
        execution: what the run executes, if that is not what the recipe leads to expect.
        limit: maximum number of layers to keep.
    """
    if recipe.training.gradient_checkpointing != "auto" or recipe.quantization.streamed_layers:
        return None
    device = device or Device()
    execution = execution or trainer_execution(recipe, device, architecture)
    available_bytes = _available(free_bytes, device)
    most = architecture.layers if limit is None else min(limit, architecture.layers)

    def estimated(count: int) -> Estimate:
        return estimate(recipe, architecture, execution=replace(execution, kept_layers=count), device=device)

    low, best, high = 0, estimated(0), most + 1
    if not (best.exact and check_fit(best, available_bytes).fits_even_if_tight):
        high = 1
    while high - low > 1:
        # The most at first: in many runs they fit.
        count = most if high > most else (low + high) // 2
        result = estimated(count)
        if check_fit(result, available_bytes).fits_with_margin:
            low, best = count, result
        else:
            high = count
    return KeptLayersPlan(low, architecture.layers, available_bytes, best)


def step_seconds(recipe: Recipe, architecture: Architecture, device: Device, kept_layers: int = 0) -> float:
    """Return the predicted time of an optimizer step, to compare settings of one recipe with each other.

    On a GPU a micro-batch takes the longer of computing and of launching its kernels; 4-bit weights are
    dequantized in each pass. On a CPU only the products count. Several GPUs share the passes.
    """
    training, layers = recipe.training, architecture.layers
    recomputed = 0 if training.gradient_checkpointing == "off" else layers - kept_layers
    once, again = products_per_token(recipe, architecture)
    rate = device.speed.flops_per_s / 2 if device.speed else _MULTIPLICATIONS_PER_S
    tokens = recipe.rows_per_pass * recipe.data.max_length
    seconds = tokens * (once + recomputed * again) / rate
    count = -(-training.gradient_accumulation // max(1, training.gpus))
    if device.kind == "cpu":
        return count * seconds
    modules = [module for module in architecture.modules if module.layer is not None]
    # Forward and backward, and what is recomputed.
    passes = 2 + recomputed / max(layers, 1)
    if recipe.quantization.method in ("nf4", "fp4"):
        seconds += _UNPACK_S * passes * sum(module.weight_params for module in modules)
    seconds = max(seconds, _LAUNCH_S * layers * passes / 3)
    fused = training.optimizer == "adamw"
    # A and B of each module.
    return count * seconds + (_FUSED_OPTIMIZER_S if fused else _LEAN_TENSOR_S * 2 * len(modules))


def products_per_token(recipe: Recipe, architecture: Architecture) -> tuple[float, float]:
    """Return the multiplications per token of forward and backward, and of the recomputation of one layer.

    A frozen weight takes part in the forward, in its recomputation, and in the gradient of its input. The
    recomputation ends before the down projection.
    """
    # Half of the scores are masked.
    attention = 2 * architecture.heads * architecture.head_dim * recipe.data.max_length / 2
    weights = down = 0
    # A norm after the MLP needs the output of the down projection.
    ends_early = _norms_of_a_layer(architecture) <= _NORMS_BEFORE_HALVES
    for module in architecture.modules:
        if module.layer is not None and module.part not in ("vision", "other"):
            weights += module.weight_params
            down += module.weight_params if ends_early and module.kind == "down_proj" else 0
    if architecture.experts is not None:
        experts = sum(module.weight_params for module in architecture.expert_modules)
        weights += experts * architecture.experts.per_token // architecture.experts.count
    layers = architecture.layers
    once = 2 * weights + layers * (1 + _ATTENTION_BACKWARD) * attention + 2 * architecture.head.weight_params
    return once, (weights - down) / max(layers, 1) + attention


def _norms_of_a_layer(architecture: Architecture) -> int:
    """Count the norms over hidden states in the first layer."""
    width = (architecture.hidden_size,)
    norms = (p for p in architecture.parameters if p.role == "norm" and p.layer == 0 and p.shape == width)
    return sum(not norm.name.endswith(".bias") for norm in norms)


_NORMS_BEFORE_HALVES = 2
"""Norms of a layer that has one before each half, and none after it."""
_FLOPS_PER_PRODUCT = 2
"""A multiplication and an addition."""
_PASSES = 2
"""Times that a layer is needed in a micro-batch: forward, and recomputation with backward."""
_NOTICEABLE_SLOWDOWN = 1.05


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
    tokens = recipe.rows_per_pass * recipe.data.max_length
    return architecture.layers * tokens * architecture.hidden_size * execution.residual_itemsize


def slowdown(
    recipe: Recipe, architecture: Architecture, execution: ExecutionConfig, speed: TransferSpeed
) -> float:
    """Return the time of a step with streamed layers, relative to one with all of them on the device."""
    once, again = products_per_token(recipe, architecture)
    tokens = recipe.rows_per_pass * recipe.data.max_length
    flops = _FLOPS_PER_PRODUCT * tokens * (once + architecture.layers * again)
    compute_s = flops / speed.flops_per_s
    copy_s = copied_bytes(recipe, architecture, execution) / speed.bytes_per_s
    return max(copy_s, compute_s) / compute_s


def describe_slowdown(recipe: Recipe, architecture: Architecture, device: Device) -> str:
    """Describe what copies cost: ``about 1.6× slower``, or what measures it."""
    if device.speed is None:
        return "slower: `qlora-tui doctor` measures how much"
    execution = trainer_execution(recipe, device, architecture)
    factor = slowdown(recipe, architecture, execution, device.speed)
    return f"about {factor:.1f}× slower" if factor >= _NOTICEABLE_SLOWDOWN else "about as fast"


def describe_host_memory(recipe: Recipe, architecture: Architecture, device: Device) -> str:
    """Describe what a recipe keeps in host memory next to a GPU, and its cost; empty if it keeps nothing.

    ``20 of 32 layers are streamed: 4.9 GiB of host memory hold the base. A step is about 1.6× slower.``
    """
    execution = trainer_execution(recipe, device, architecture)
    streamed = streamed_weights(recipe, architecture, execution)
    sentences = []
    if streamed is not None and device.kind == "cuda":
        base = sum(frozen_weights(recipe, architecture, execution).values())
        layers = f"{len(streamed.indices)} of {architecture.layers} layers"
        sentences.append(f"{layers} are streamed: {format_gib(base)} GiB of host memory hold the base.")
    if execution.offloads_inputs:
        size = _input_bytes(recipe, architecture, execution)
        sentences.append(f"Layer inputs take {format_gib(size)} GiB of host memory.")
    if not sentences:
        return ""
    return " ".join((*sentences, f"A step is {describe_slowdown(recipe, architecture, device)}."))
