"""Memory of oneDNN on a CPU: the code it generates for each shape of a bfloat16 product.

torch passes bfloat16 products to oneDNN, float32 ones to MKL, which generates no code. Measured with torch
2.13: each new shape adds 0.57 MB to the heap, of which 0.3 are freed when oneDNN's cache evicts the shape.
The rest, a code buffer of 256 KiB per kernel, stays (cpu/x64/brgemm/brgemm_containers.cpp keeps every
kernel).
"""

from __future__ import annotations

from qlora_tui.gpu.torch_env import ONEDNN_CACHE_CAPACITY
from qlora_tui.memory.execution import LOSS_CHUNK_ROWS, ExecutionConfig
from qlora_tui.memory.layout import Layout

KEPT_BYTES = 300 * 1024
KERNEL_BYTES = 268 * 1024
TOKEN_MULTIPLE = 32
"""Multiple of tokens to which rows, samples and loss chunks are padded (training/padding.py): a kernel takes
milliseconds to generate, and without padding there would be some 10 for each new length of a sample, some 25
for each of a row."""
ATTENTION_PRODUCTS = 5
"""Products for each sample length: those of attention's backward (training/fused/cpu_attention.py). The
forward generates no kernel."""
FULL_ROWS = 4
"""Number of lengths that packed sequences have: all are nearly full."""


def kernel_bytes(layout: Layout, execution: ExecutionConfig) -> int:
    """Return the heap bytes after a run with samples of every length; 0 except for bfloat16 on a CPU."""
    if execution.device != "cpu" or execution.compute_itemsize != 2 or execution.float16:
        return 0
    lengths = -(-layout.length // TOKEN_MULTIPLE)
    rows = min(FULL_ROWS, lengths) if execution.packing else lengths
    chunks = min(lengths, LOSS_CHUNK_ROWS // TOKEN_MULTIPLE)
    shapes = _products(layout) * rows + ATTENTION_PRODUCTS * lengths + 2 * chunks
    return ONEDNN_CACHE_CAPACITY * KEPT_BYTES + shapes * KERNEL_BYTES


def _products(layout: Layout) -> int:
    """Count the product shapes over one row: two with each weight, three with each half of an adapter."""
    linears = {linear for block in layout.blocks for linear in block.linears}
    weights = {(linear.inputs, linear.outputs) for linear in linears}
    halves = {(linear.inputs, "A") for linear in linears if linear.rank}
    halves |= {(linear.outputs, "B") for linear in linears if linear.rank}
    return 2 * len(weights) + 3 * len(halves)
