"""Chooses how a run uses free memory: more rows at a time, faster optimizer states, fewer recomputed layers.

A recipe is estimated with the settings that need the least memory: all layers are recomputed, and ``optimizer
= "auto"`` means the optimizer with the smallest states. Free memory beyond that is used for speed:

* With ``gradient_checkpointing = "auto"`` only as many layers are recomputed as necessary; recomputing all of
  them makes a step about a third slower. The layers that keep their activations are the last ones: their
  backward comes first, so that their memory is free again when earlier layers are recomputed.
* With ``auto_micro_batch`` each micro-batch has more rows, so a step needs fewer micro-batches for its rows.
* With ``optimizer = "auto"`` AdamW runs in one kernel with 32-bit states instead of paged 8-bit states.

All three compete for the same memory, so the fastest combination is chosen by the predicted time of a step.
The trainer chooses rows and optimizer before it loads the model. It chooses the number of recomputed layers
afterwards, for the longest batch of the run. After an out-of-memory error, the optimizer has the smallest
states, and ``runs.memory_retry`` lowers the number of layers that keep their activations or, if there are
none, the rows at a time.

The slowdown from streamed layers or offloaded inputs is calculated from the same amount of computation:
copies run during the computation, so a step takes the longer of the two times. A micro-batch copies each of S
streamed layers twice, in forward and backward, except the two that are still in the buffers when the
direction changes: 2 (S - 2) copies.
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
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.training_settings import RecipeOptimizer

CPU_SHARE = 0.5
"""Share of free memory that a run on the CPU may take, because other programs need memory too."""
_ATTENTION_BACKWARD = 2.5
"""FLOPs of attention's backward relative to its forward.

The backward has five matrix products instead of two; one of them recomputes the scores (FlashAttention-2,
section 3.1).
"""


_MULTIPLICATIONS_PER_S = 30e12
"""Assumed multiplications per second of a GPU that was not measured.

The value is between an RTX 3060 (about 12e12) and an RTX 4090 (about 70e12), as calculated from their
specifications.
"""
_LAUNCH_S = 4e-3
"""Seconds a CPU takes to launch the kernels of a recomputed layer for one micro-batch of any size.

Estimated for a desktop from 7.2 ms measured on a slow server.
"""
_UNPACK_S = 4e-12
"""Seconds to dequantize a 4-bit weight: 2.5 bytes read and written, at 0.6 TB/s (calculated)."""
_LEAN_TENSOR_S = 8e-5
"""Seconds that bitsandbytes' optimizers wait for the GPU after each tensor.

Calculated from 30 to 45 ms for 448 tensors.
"""
_FUSED_OPTIMIZER_S = 1e-3
_NOTICEABLE = 1.01
"""Speedup that more rows at a time must give to be worth their memory."""


@dataclass(frozen=True)
class StepChoice:
    """How a run uses the memory that is free."""

    given: Recipe
    recipe: Recipe
    """``given`` with the chosen rows at a time, accumulation and optimizer."""
    kept: KeptLayersPlan | None
    """The layers that keep their activations; None if the recipe fixes them."""
    estimate: Estimate
    """Memory of the run."""
    speedup: float
    """Predicted speed relative to the settings that need the least memory: 1.2 is 20 % faster."""

    @property
    def least_free_bytes(self) -> int:
        """Minimum free memory for this choice to fit with a margin (``TIGHT_SHARE``)."""
        share = CPU_SHARE if self.estimate.execution.device == "cpu" else 1
        return int(self.estimate.band.high_bytes / (1 - TIGHT_SHARE) / share)

    @property
    def kept_layers(self) -> int:
        """Number of layers that keep their activations, although the recipe allows them to be recomputed."""
        return self.kept.kept_layers if self.kept else 0


@dataclass(frozen=True)
class KeptLayersPlan:
    """The number of layers that keep their activations."""

    kept_layers: int
    total_layers: int
    """Number of layers of the model."""
    available_bytes: int
    """Memory that the run may take."""
    estimate: Estimate
    """Memory of the run with these layers."""


def choose_step(
    recipe: Recipe,
    architecture: Architecture,
    free_bytes: int,
    *,
    device: Device | None = None,
) -> StepChoice:
    """Return the fastest choice that the recipe allows and that fits in memory.

    A choice fits if it leaves 5 % of the memory free at the upper end of the estimate's uncertainty range. If
    none fits, the choice that needs the least memory is returned. This choice is also returned if the
    estimate only approximates the layers of the model, or if layers are streamed, because the memory of such
    a run is already too small for its weights.

    Args:
        free_bytes: memory of the device that no other process uses, including the memory of this run.

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
    """Return the micro-batch sizes to try, the recipe's first, then the larger divisors of a step's rows.

    Only the recipe's size is tried on a CPU, where more rows are not faster, or without ``auto_micro_batch``.
    """
    least, rows = recipe.training.micro_batch_size, recipe.effective_batch
    if device.kind == "cpu" or not recipe.training.auto_micro_batch:
        return [least]
    small = [size for size in range(1, isqrt(rows) + 1) if rows % size == 0]
    sizes = sorted({*small, *(rows // size for size in small)})
    return [least, *(size for size in sizes if size > least)]


def with_micro_batch(recipe: Recipe, rows: int) -> Recipe:
    """Return the recipe with the micro-batch size ``rows``. The number of rows in a step stays the same."""
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

    None also with streamed layers, because such a run lacks memory for its weights. The result is the largest
    number with which the upper end of the estimate's uncertainty range leaves 5 % of the memory free. No
    layer is kept in a family whose layers the estimate only approximates.

    Args:
        free_bytes: memory of the device that no other process uses, including the memory of this run.
        execution: the code that the run executes, if it differs from that expected from the recipe.
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
        # The largest number is tried first, because it fits in many runs.
        count = most if high > most else (low + high) // 2
        result = estimated(count)
        if check_fit(result, available_bytes).fits_with_margin:
            low, best = count, result
        else:
            high = count
    return KeptLayersPlan(low, architecture.layers, available_bytes, best)


def step_seconds(recipe: Recipe, architecture: Architecture, device: Device, kept_layers: int = 0) -> float:
    """Return the predicted time of an optimizer step, to compare settings of one recipe with each other.

    On a GPU, a micro-batch takes the longer of computing and launching its kernels, and 4-bit weights are
    dequantized in each pass. On a CPU only the matrix products count. Several GPUs share the micro-batches.
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
    # Forward and backward, and the recomputation.
    passes = 2 + recomputed / max(layers, 1)
    if recipe.quantization.method in ("nf4", "fp4"):
        seconds += _UNPACK_S * passes * sum(module.weight_params for module in modules)
    seconds = max(seconds, _LAUNCH_S * layers * passes / 3)
    fused = training.optimizer == "adamw"
    # A and B of each module.
    return count * seconds + (_FUSED_OPTIMIZER_S if fused else _LEAN_TENSOR_S * 2 * len(modules))


def products_per_token(recipe: Recipe, architecture: Architecture) -> tuple[float, float]:
    """Return the multiplications per token of forward and backward, and of recomputing one layer.

    A frozen weight takes part in the forward, in the recomputation, and in the gradient of its input. The
    recomputation ends before the down projection, unless a norm after the MLP needs its output.
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
"""Number of norms of a layer that has one before each half, and none after it."""
_FLOPS_PER_PRODUCT = 2
"""FLOPs for each multiplication in a matrix product: the multiplication and an addition."""
_PASSES = 2
"""Number of times that a micro-batch needs a layer: in the forward, then in recomputation and backward."""
_NOTICEABLE_SLOWDOWN = 1.05


def copied_bytes(recipe: Recipe, architecture: Architecture, execution: ExecutionConfig) -> int:
    """Return the bytes that are copied for a micro-batch.

    Streamed layers are copied in forward and backward, except the two that are still in the buffers;
    offloaded inputs are copied to the host and back.
    """
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
    """Return the time of a step with streamed layers or offloaded inputs, relative to one without copies."""
    once, again = products_per_token(recipe, architecture)
    tokens = recipe.rows_per_pass * recipe.data.max_length
    flops = _FLOPS_PER_PRODUCT * tokens * (once + architecture.layers * again)
    compute_s = flops / speed.flops_per_s
    copy_s = copied_bytes(recipe, architecture, execution) / speed.bytes_per_s
    return max(copy_s, compute_s) / compute_s


def describe_slowdown(recipe: Recipe, architecture: Architecture, device: Device) -> str:
    """Return how much copying slows down training, such as ``about 1.6× slower``. If the speed was not
    measured, return how to measure it.
    """
    if device.speed is None:
        return "slower: `qlora-tui doctor` measures how much"
    execution = trainer_execution(recipe, device, architecture)
    factor = slowdown(recipe, architecture, execution, device.speed)
    return f"about {factor:.1f}× slower" if factor >= _NOTICEABLE_SLOWDOWN else "about as fast"


def describe_host_memory(recipe: Recipe, architecture: Architecture, device: Device) -> str:
    """Describe what a GPU run keeps in host memory, and its cost; empty if it keeps nothing there.

    Example: ``20 of 32 layers are streamed; the base model takes 4.9 GiB of host memory. A step is about 1.6×
    slower.``
    """
    execution = trainer_execution(recipe, device, architecture)
    streamed = streamed_weights(recipe, architecture, execution)
    sentences = []
    if streamed is not None and device.kind == "cuda":
        base = sum(frozen_weights(recipe, architecture, execution).values())
        layers = f"{len(streamed.indices)} of {architecture.layers} layers"
        taken = f"{format_gib(base)} GiB of host memory"
        sentences.append(f"{layers} are streamed; the base model takes {taken}.")
    if execution.offloads_inputs:
        size = _input_bytes(recipe, architecture, execution)
        sentences.append(f"Layer inputs take {format_gib(size)} GiB of host memory.")
    if not sentences:
        return ""
    return " ".join((*sentences, f"A step is {describe_slowdown(recipe, architecture, device)}."))
