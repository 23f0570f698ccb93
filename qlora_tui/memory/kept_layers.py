"""How many layers can keep their activations in the memory that is free, instead of recomputing them.

Gradient checkpointing recomputes every layer in the backward pass, which makes a step about a third slower
even if most of the GPU's memory is free. With ``gradient_checkpointing = "auto"`` only as many layers are
checkpointed as must be. The layers that keep their activations are the last ones: their backward comes first,
so that their memory is free again when the others are recomputed.

The trainer calls this before its first step (``training.callbacks``), and applies the result with
``training.model_loading.apply_kept_layers``. After an out-of-memory error ``runs.retry`` lowers the limit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.memory.estimate import Estimate, estimate
from qlora_tui.memory.execution import Device, ExecutionConfig, trainer_execution
from qlora_tui.memory.layout import STYLES
from qlora_tui.memory.verdict import check_fit
from qlora_tui.recipe.schema import Recipe

CPU_SHARE = 0.5
"""Share of the free memory of a machine without a GPU that a run may take: other programs run there too."""
_ATTENTION_BACKWARD = 2.5
"""FLOPs of attention's backward relative to its forward: five matrix products instead of two, one of which
recomputes the scores (FlashAttention-2, section 3.1)."""


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
    speedup: float
    """Predicted speed relative to a run that recomputes every layer: 1.2 is 20 % faster."""


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
        execution: what the run executes, where that is not what the recipe leads to expect.
        limit: maximum number of layers to keep.
    """
    if recipe.training.gradient_checkpointing != "auto" or recipe.quantization.streamed_layers:
        return None
    device = device or Device()
    execution = execution or trainer_execution(recipe, device, architecture)
    available_bytes = int(free_bytes * CPU_SHARE) if device.kind == "cpu" else free_bytes
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
    return KeptLayersPlan(low, architecture.layers, available_bytes, best, speedup(recipe, architecture, low))


def speedup(recipe: Recipe, architecture: Architecture, count: int) -> float:
    """Return the predicted speed with ``count`` layers kept, relative to none, by a step's products."""
    if not architecture.layers:
        return 1.0
    once, again = products_per_token(recipe, architecture)
    layers = architecture.layers
    return (once + layers * again) / (once + (layers - count) * again)


def products_per_token(recipe: Recipe, architecture: Architecture) -> tuple[float, float]:
    """Return the multiplications per token of forward and backward, and of the recomputation of one layer.

    A frozen weight takes part in the forward, in its recomputation, and in the gradient of its input. The
    recomputation ends before the down projection (``bench/kept_layers.py`` compares with measured steps).
    """
    # Half of the scores are masked.
    attention = 2 * architecture.heads * architecture.head_dim * recipe.data.max_length / 2
    weights = down = 0
    # A norm after the MLP needs the output of the down projection.
    style = STYLES.get(architecture.model_type)
    ends_early = style is None or style.order in ("pre", "parallel")
    for module in architecture.modules:
        if module.layer is not None and module.part not in ("vision", "other"):
            weights += module.weight_params
            down += module.weight_params if ends_early and module.kind == "down_proj" else 0
    layers = architecture.layers
    once = 2 * weights + layers * (1 + _ATTENTION_BACKWARD) * attention + 2 * architecture.head.weight_params
    return once, (weights - down) / max(layers, 1) + attention
