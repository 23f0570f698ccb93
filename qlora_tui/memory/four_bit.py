"""Weights in 4 bits: which are quantized, and the sizes of their tensors.

Sources: bitsandbytes ``functional.py`` (``quantize_4bit`` with blocks of 64, ``quantize_blockwise`` with
blocks of 256 for the scales of a double quantization), and ``training/experts/expert_storage.py``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.memory.execution import ExecutionConfig
from qlora_tui.recipe.schema import Quantization, Recipe

BLOCK = 64
"""Weights that share one scale (``blocksize`` of Linear4bit)."""
NESTED_BLOCK = 256
"""Scales that share one scale, with double quantization."""
CODE_BYTES = 16 * 4
"""The sixteen values of NF4 or FP4, stored by each module."""
NESTED_CODE_BYTES = 256 * 4


@lru_cache(maxsize=256)
def four_bit_scale_sizes(weights: int, nested: bool) -> tuple[int, ...]:
    """Return the bytes of each tensor of scales and code tables in one 4-bit module."""
    blocks = -(-weights // BLOCK)
    if not nested:
        return (blocks * 4, CODE_BYTES)
    return (blocks, -(-blocks // NESTED_BLOCK) * 4, CODE_BYTES, NESTED_CODE_BYTES, 4)


def expert_method(
    recipe: Recipe, architecture: Architecture, execution: ExecutionConfig
) -> Literal["nf4", "fp4", "none"]:
    """Return how the trainer stores fused experts; only this project's quantizes them."""
    return quantized_experts(recipe.quantization, architecture) if execution.own_fused else "none"


def expert_tensor_sizes(shape: tuple[int, ...], nested: bool) -> tuple[int, ...]:
    """Return the bytes of each tensor of a stack of 4-bit matrices: weights, then scales.

    ``shape`` is (experts, rows, columns). Code tables are shared by all modules.
    """
    experts, weights = shape[0], shape[1] * shape[2]
    packed, blocks = -(-weights // 2), -(-weights // BLOCK)
    if not nested:
        return (experts * packed, experts * blocks * 4)
    return (experts * packed, experts * blocks, experts * -(-blocks // NESTED_BLOCK) * 4, experts * 4)


def quantized_experts(settings: Quantization, architecture: Architecture) -> Literal["nf4", "fp4", "none"]:
    """Return how the fused experts of a mixture are quantized.

    ``none`` also for a model without experts, and for files that bitsandbytes quantized already: these hold
    the experts as it left them.
    """
    if (
        settings.method not in ("nf4", "fp4")
        or not settings.experts
        or architecture.experts is None
        or architecture.quantized_as == "bitsandbytes"
    ):
        return "none"
    has_experts = any(parameter.is_expert_matrices for parameter in architecture.parameters)
    return settings.method if has_experts else "none"


def require_4_bit_experts(settings: Quantization, architecture: Architecture) -> None:
    """Raise UserError where experts that are stored in MXFP4 would be read in 16 bits."""
    if architecture.quantized_as != "mxfp4" or quantized_experts(settings, architecture) != "none":
        return
    is_method = settings.method not in ("nf4", "fp4")
    setting = f'method is "{settings.method}"' if is_method else "experts is false"
    remedy = 'method = "nf4"' if is_method else "experts = true"
    raise UserError(
        "This model's experts need 4 bits",
        what=f"quantization.{setting}, and the model stores its experts in 4-bit floats (MXFP4).",
        why="They are read into 4 bits, one by one; in 16 bits they would take four times the memory.",
        fix=f"Set quantization.{remedy}.",
        exit_code=EXIT_USAGE,
    )
