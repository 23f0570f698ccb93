"""Weights as the training saw them: quantized to 4 bits by bitsandbytes, and back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.recipe.schema import Quantization


@dataclass(frozen=True)
class Requantizer:
    """Rounds weights as the training did; call it with a tensor's name and values."""

    settings: Quantization
    tails: frozenset[str]
    """Names of the weights of the text model that training quantizes, from their layer on."""
    towers: frozenset[str] = frozenset()
    """Parts of names, between dots, of the modules that read images."""

    def quantizes(self, name: str) -> bool:
        """Return whether a tensor of the weight files is rounded.

        Modules that read images are not, although training quantizes them: text never passes through them,
        so that an adapter cannot make up for their rounding.
        """
        return _tail(name) in self.tails and self.towers.isdisjoint(name.split("."))

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """Return the tensor rounded; unchanged if training does not quantize it."""
        return round_to_4_bits(weight, self.settings) if self.quantizes(name) else weight


def requantizer(architecture: Architecture, settings: Quantization) -> Requantizer | None:
    """Return what rounds a model's weights as the training did; None for a method without 4-bit weights."""
    if settings.method not in ("nf4", "fp4"):
        return None
    text = [module for module in architecture.modules if module.part != "vision"]
    quantized = (_tail(f"{module.name}.weight") for module in text if module.quantizable)
    towers = (
        module.name.removeprefix("model.").partition(".")[0]
        for module in architecture.modules
        if module.part == "vision"
    )
    return Requantizer(settings, frozenset(quantized), frozenset(towers))


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
