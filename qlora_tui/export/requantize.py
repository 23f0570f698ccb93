"""Weights as the training saw them: quantized to 4 bits by bitsandbytes, and back."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.recipe.schema import Quantization


def requantizer(architecture: Architecture, settings: Quantization) -> Callable[[str, Tensor], Tensor] | None:
    """Return a function of a tensor's name and values that rounds them as the training did.

    It returns the tensors that training does not quantize unchanged. None for a method without 4-bit weights.
    """
    if settings.method not in ("nf4", "fp4"):
        return None
    quantized = {_tail(f"{module.name}.weight") for module in architecture.modules if module.quantizable}

    def requantize(name: str, weight: Tensor) -> Tensor:
        return round_to_4_bits(weight, settings) if _tail(name) in quantized else weight

    return requantize


def round_to_4_bits(weight: Tensor, settings: Quantization) -> Tensor:
    """Quantize a matrix and dequantize it again, in its dtype."""
    from bitsandbytes import functional

    quantized, state = functional.quantize_4bit(
        weight.contiguous(),
        quant_type=settings.method,
        compress_statistics=settings.double_quantization,
    )
    rounded: Tensor = functional.dequantize_4bit(quantized, state)
    return rounded.to(weight.dtype)


def _tail(name: str) -> str:
    """A text model inside a multimodal one is named with or without the outer part."""
    _, separator, tail = name.partition("layers.")
    return separator + tail if separator else name
