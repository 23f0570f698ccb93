"""Memory that is constant through a step: weights, adapter, optimizer states, batch, workspace."""

from __future__ import annotations

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.memory.execution import ExecutionConfig
from qlora_tui.memory.layout import Layout
from qlora_tui.memory.parameter_memory import adapter_bytes, frozen_weights, optimizer_bytes, round_to_block
from qlora_tui.memory.step import residual_itemsize
from qlora_tui.memory.streamed_layers import streamed_weights
from qlora_tui.recipe.schema import Recipe

FROZEN = ("weights", "scales", "linear", "embedding", "head", "norms", "experts", "vision", "slots")
"""Items that belong to the base model."""
CUBLAS_WORKSPACE_BYTES = 8_519_680
"""torch's default ``CUBLAS_WORKSPACE_CONFIG``, ``:4096:2:16:8``: 2 × 4,096 KiB + 8 × 16 KiB
(``parseChosenWorkspaceSize`` in aten/src/ATen/cuda/CublasHandlePool.cpp), taken from the allocator."""
HOPPER_WORKSPACE_BYTES = 32 * 2**20
"""cuBLAS workspace for compute capability 9.0 and 10.0, ``:4096:8``."""
CUBLAS_HANDLES = 2
"""Number of cuBLAS handles, each with a workspace: the calling thread's and autograd's."""


def static_items(
    recipe: Recipe, architecture: Architecture, layout: Layout, execution: ExecutionConfig
) -> dict[str, int]:
    """Return the bytes by item."""
    frozen = frozen_weights(recipe, architecture, execution)
    items = {
        "weights": frozen.packed_bytes,
        "scales": frozen.scale_bytes,
        "linear": frozen.dense_bytes,
        "embedding": frozen.embedding_bytes,
        "head": frozen.head_bytes,
        "norms": frozen.norm_and_other_bytes,
        "experts": frozen.expert_bytes,
        "vision": frozen.vision_bytes,
        "adapter": adapter_bytes(layout, execution) * (2 if recipe.keeps_starting_adapter else 1),
        "inputs": input_bytes(architecture, layout, execution),
        "mask": mask_bytes(layout, execution),
    }
    streamed = streamed_weights(recipe, architecture, execution) if execution.streamed_layers else None
    if streamed is not None:
        items["slots"] = streamed.slot_bytes
        if execution.device == "cuda":  # On a CPU host memory is the memory of the device.
            for key, size in streamed.items.items():
                items[key] -= size
    if execution.device == "cuda":
        items["workspace"] = CUBLAS_HANDLES * workspace_bytes(execution)
    if not execution.pages_states:
        items["optimizer"] = optimizer_bytes(layout, execution)
    return {key: size for key, size in items.items() if size}


def workspace_bytes(execution: ExecutionConfig) -> int:
    """Return the workspace bytes of one cuBLAS handle on the run's GPU."""
    return HOPPER_WORKSPACE_BYTES if execution.capability in ((9, 0), (10, 0)) else CUBLAS_WORKSPACE_BYTES


def input_bytes(architecture: Architecture, layout: Layout, execution: ExecutionConfig) -> int:
    """Return the bytes of ids, labels, shifted labels and positions, 8 each, and of the rotary tables."""
    tables = 2 * layout.length * architecture.head_dim * residual_itemsize(execution)
    return 4 * round_to_block(layout.tokens * 8) + round_to_block(tables)


def mask_bytes(layout: Layout, execution: ExecutionConfig) -> int:
    """Return the bytes of eager attention's mask, in the hidden states' dtype."""
    if execution.attention == "eager":
        return round_to_block(layout.length * layout.length * residual_itemsize(execution))
    return 0
