"""Weights as the training saw them: quantized to 4 bits by bitsandbytes, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from qlora_tui.catalog.architecture_types import Architecture, inner_name
from qlora_tui.catalog.model_validation import read_header
from qlora_tui.chat.expert_deltas import GRANITE, MATRICES
from qlora_tui.memory.weights import quantized_experts
from qlora_tui.recipe.schema import Quantization

TensorReader: TypeAlias = Callable[[str], Tensor]
"""Returns the values of a tensor by its name."""
_STACKED = 3
"""Dimensions of a tensor that holds a matrix of each expert."""
_GRANITE_PARAMETERS = {name.removesuffix(".weight"): parameter for parameter, name in GRANITE.items()}


@dataclass(frozen=True)
class Requantizer:
    """Rounds weights as the training did; call it with a tensor's name and values."""

    settings: Quantization
    tails: frozenset[str]
    """Names of the weights of the text model that training quantizes, from their layer on."""
    towers: frozenset[str] = frozenset()
    """Parts of names, between dots, of the modules that read images."""
    experts: frozenset[str] = frozenset()
    """Names of the parameters of experts that training quantizes, from their layer on."""

    def quantizes(self, name: str) -> bool:
        """Return whether a tensor of the weight files is rounded.

        Modules that read images are not, although training quantizes them: text never passes through them,
        so that an adapter cannot make up for their rounding.
        """
        is_quantized = inner_name(name) in self.tails or self._expert_weight(name) is not None
        return is_quantized and self.towers.isdisjoint(name.split("."))

    def __call__(self, name: str, weight: Tensor, read: TensorReader | None = None) -> Tensor:
        """Return the tensor rounded; unchanged if training does not quantize it.

        Args:
            name: its name, in the weight files or in the model.
            weight: its values.
            read: returns the values of another tensor of the weight files: training joins the gate and up
                projections of an expert before it quantizes them.
        """
        if not self.quantizes(name):
            return weight
        expert = self._expert_weight(name)
        if expert is None:
            return round_to_4_bits(weight, self.settings)
        if weight.dim() == _STACKED:
            return torch.stack([round_to_4_bits(matrix, self.settings) for matrix in weight])
        if len(expert.parts) == 1:
            return round_to_4_bits(weight, self.settings)
        if read is None:
            raise ValueError(f"{name} is quantized with another tensor, which cannot be read")
        joined = torch.cat([weight if part == name else read(part) for part in expert.parts])
        rounded = round_to_4_bits(joined, self.settings)
        return rounded.chunk(len(expert.parts))[expert.parts.index(name)].contiguous()

    def _expert_weight(self, name: str) -> _ExpertWeight | None:
        """What a tensor holds of the quantized experts; None for any other tensor."""
        if not self.experts:
            return None
        if inner_name(name) in self.experts:
            return _ExpertWeight()
        holder, _, last = name.removesuffix(".weight").rpartition(".")
        if (parameter := _GRANITE_PARAMETERS.get(last)) is not None:
            return _ExpertWeight() if f"{inner_name(holder)}.experts.{parameter}" in self.experts else None
        path, _, number = holder.rpartition(".")
        for parameter, alternatives in MATRICES.items():
            for parts in alternatives:
                known = inner_name(f"{path.replace('.block_sparse_moe.', '.mlp.')}.{parameter}")
                if number.isdigit() and last in parts and known in self.experts:
                    return _ExpertWeight(tuple(f"{holder}.{part}.weight" for part in parts))
        return None


@dataclass(frozen=True)
class _ExpertWeight:
    """A tensor of quantized experts."""

    parts: tuple[str, ...] = ()
    """Tensors that are quantized together, in their order; empty for a tensor of all experts."""


def requantizer(architecture: Architecture, settings: Quantization) -> Requantizer | None:
    """Return what rounds a model's weights as the training did; None for a method without 4-bit weights."""
    if settings.method not in ("nf4", "fp4"):
        return None
    text = [module for module in architecture.modules if module.part != "vision"]
    quantized = (inner_name(f"{module.name}.weight") for module in text if module.quantizable)
    towers = (
        module.name.removeprefix("model.").partition(".")[0]
        for module in architecture.modules
        if module.part == "vision"
    )
    has_quantized_experts = quantized_experts(settings, architecture) != "none"
    experts = (inner_name(module.name) for module in architecture.expert_modules if has_quantized_experts)
    return Requantizer(settings, frozenset(quantized), frozenset(towers), frozenset(experts))


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


def reader_of(files: Iterable[Path]) -> TensorReader:
    """Return what reads a tensor of weight files by its name."""
    places = {name: file for file in files for name in read_header(file)[1]}

    def read(name: str) -> Tensor:
        with safe_open(places[name], framework="pt") as content:
            tensor: Tensor = content.get_tensor(name)
            return tensor

    return read
