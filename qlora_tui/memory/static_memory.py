"""Memory that is constant throughout a step: weights, adapter, optimizer states, batch, workspaces.

Sources: bitsandbytes ``optim/optimizer.py`` (8-bit states for tensors of at least 4,096 elements,
``min_8bit_size``), QLoRA (arXiv 2305.14314, section 3).
"""

from __future__ import annotations

from collections import Counter
from math import prod

from qlora_tui.memory.execution import ADAPTER_ITEMSIZE, ExecutionConfig
from qlora_tui.memory.layout import Layout
from qlora_tui.memory.weights import frozen_weights, round_to_block, streamed_weights

SMALL_TENSOR = 4096
"""Number of elements below which bitsandbytes uses 32-bit optimizer states for a tensor."""
STATE_BLOCK = 256
STEP_ITEMSIZE: dict[str, int] = {"adamw": 4, "adafactor": 12}
"""Temporary bytes per element of a tensor during its optimizer step.

AdamW needs memory for a square root; Adafactor, for the squared gradient and the two factors of its update.
"""

CPU_STEP_ITEMSIZE: dict[str, int] = {
    **dict.fromkeys(("adamw_8bit", "paged_adamw_8bit", "lion_8bit"), 20),
    **dict.fromkeys(("paged_adamw_32bit", "lion"), 12),
}
"""``STEP_ITEMSIZE`` on a CPU, where bitsandbytes 0.50 computes with torch and dequantizes 8-bit states.

Measured as the growth of the process in the step of a matrix with 28 million elements.
"""


def step_itemsize(execution: ExecutionConfig) -> int:
    """Return the temporary bytes per element of a tensor during its optimizer step."""
    itemsizes = STEP_ITEMSIZE | CPU_STEP_ITEMSIZE if execution.device == "cpu" else STEP_ITEMSIZE
    return itemsizes.get(execution.optimizer, 0)


def adapter_bytes(layout: Layout) -> int:
    """Return the bytes of the trained matrices; their gradients have the same dtype and take as many."""
    sizes = Counter(layout.adapter_tensors).items()
    return sum(times * round_to_block(count * ADAPTER_ITEMSIZE) for count, times in sizes)


def optimizer_bytes(layout: Layout) -> int:
    """Return the bytes of all states. Paged states take the same bytes in managed memory."""
    total = 0
    for shape, times in Counter(layout.adapter_shapes).items():
        total += times * sum(map(round_to_block, state_sizes(shape, layout.execution)))
    return total


def state_sizes(shape: tuple[int, ...], execution: ExecutionConfig) -> tuple[int, ...]:
    """Return the bytes of each state of one trained tensor: moments, and the scales of 8-bit moments.

    AdamW has two moments, and Lion (bitsandbytes ``lion.py``) has one. For Adafactor's second moment,
    transformers keeps the means of rows and columns, and a scalar.
    """
    count, optimizer = prod(shape), execution.optimizer
    moments = 1 if optimizer in ("lion", "lion_8bit") else 2
    if "8bit" in optimizer and count >= SMALL_TENSOR:
        return (*[count] * moments, *[-(-count // STATE_BLOCK) * 4] * moments)
    if optimizer == "adafactor":
        return (*[size * 4 for size in shape], 4)
    return (count * 4,) * moments


def optimizer_step_bytes(layout: Layout) -> int:
    """Return the temporary bytes of one optimizer step.

    torch's multi-tensor AdamW takes a square root of all second moments at once (``_foreach_sqrt``). Fused
    and bitsandbytes kernels need no temporary memory on a GPU. Other optimizers process one tensor after
    another.
    """
    execution = layout.execution
    if execution.optimizer == "adamw" and execution.device == "cuda":
        return adapter_bytes(layout)
    largest = max(layout.adapter_tensors, default=0)
    return round_to_block(largest * step_itemsize(execution))


FROZEN = ("weights", "scales", "linear", "embedding", "head", "norms", "experts", "vision", "slots")
"""Items that belong to the base model."""
CUBLAS_WORKSPACE_BYTES = 8_519_680
"""torch's default ``CUBLAS_WORKSPACE_CONFIG``, ``:4096:2:16:8``: 2 × 4,096 KiB + 8 × 16 KiB.

The workspace is taken from the allocator (``parseChosenWorkspaceSize`` in
aten/src/ATen/cuda/CublasHandlePool.cpp).
"""
HOPPER_WORKSPACE_BYTES = 32 * 2**20
"""cuBLAS workspace for compute capability 9.0 and 10.0, ``:4096:8``."""
CUBLAS_HANDLES = 2
"""Number of cuBLAS handles, each with a workspace: the calling thread's and autograd's."""


def static_items(layout: Layout) -> dict[str, int]:
    """Return the bytes of the tensors that exist throughout a step, by item."""
    recipe, architecture, execution = layout.recipe, layout.architecture, layout.execution
    items = frozen_weights(recipe, architecture, execution) | {
        "adapter": adapter_bytes(layout) * (2 if recipe.keeps_starting_adapter else 1),
        "inputs": input_bytes(layout),
        "mask": mask_bytes(layout),
    }
    streamed = streamed_weights(recipe, architecture, execution) if execution.streamed_layers else None
    if streamed is not None:
        items["slots"] = streamed.slot_bytes
        if execution.device == "cuda":  # On a CPU, host memory is the memory of the device.
            for key, size in streamed.items.items():
                items[key] -= size
    if execution.device == "cuda":
        items["workspace"] = CUBLAS_HANDLES * workspace_bytes(execution)
    if not execution.pages_states:
        items["optimizer"] = optimizer_bytes(layout)
    return {key: size for key, size in items.items() if size}


def workspace_bytes(execution: ExecutionConfig) -> int:
    """Return the workspace bytes of one cuBLAS handle on the run's GPU."""
    return HOPPER_WORKSPACE_BYTES if execution.capability in ((9, 0), (10, 0)) else CUBLAS_WORKSPACE_BYTES


def input_bytes(layout: Layout) -> int:
    """Return the bytes of ids, labels, shifted labels, positions (8 per token for each) and rotary tables."""
    architecture, execution = layout.architecture, layout.execution
    tables = 2 * layout.length * architecture.head_dim * execution.residual_itemsize
    return 4 * round_to_block(layout.tokens * 8) + round_to_block(tables)


def mask_bytes(layout: Layout) -> int:
    """Return the bytes of eager attention's mask, in the dtype of the hidden states."""
    execution = layout.execution
    if execution.attention == "eager":
        return round_to_block(layout.length * layout.length * execution.residual_itemsize)
    return 0
