"""The weights of a base with an adapter merged in, one tensor at a time.

The base may be its stored 16-bit weights, or these weights as the training saw them: quantized to 4 bits by
bitsandbytes, and back (:class:`Requantizer`). An adapter that learned on 4-bit weights also learned to make
up for their rounding errors, and may answer otherwise on the 16-bit ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from qlora_tui.adapters.base_weights import StatusFn, model_folder, placed_updates
from qlora_tui.adapters.deltas import GRANITE, MATRICES, AdapterDeltas, LoraDelta
from qlora_tui.catalog.architecture_types import Architecture, inner_name
from qlora_tui.catalog.config_parser import load_config
from qlora_tui.catalog.model_validation import CONFIG, is_mxfp4, read_header
from qlora_tui.errors import UserError
from qlora_tui.memory.weights import quantized_experts
from qlora_tui.recipe.schema import Quantization, Recipe

TensorReader: TypeAlias = Callable[[str], Tensor]
"""Returns the values of a tensor by its name."""
_STACKED = 3
"""Dimensions of a tensor that holds a matrix of each expert."""
_GRANITE_PARAMETERS = {name.removesuffix(".weight"): parameter for parameter, name in GRANITE.items()}


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of a weight file."""

    name: str
    """Its name in the weight file."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Returns its values: float32 where LoRA changes it, else in the stored dtype."""


@dataclass(frozen=True)
class MergedWeights:
    """The base's weight files, and the adapter's update of each tensor."""

    folder: Path
    """The base's folder."""
    updates: dict[Path, AdapterDeltas]
    """By weight file, then by tensor name."""
    requantize: Requantizer | None = None
    """Rounds a tensor as quantization did in training; None keeps the stored values."""

    @property
    def changed(self) -> int:
        """Return the number of tensors that the adapter changes."""
        return sum(map(len, self.updates.values()))

    def __iter__(self) -> Iterator[MergedTensor]:
        """Yield every tensor in the order of the files."""
        for file in self.updates:
            for name, entry in read_header(file)[1].items():
                if name != "__metadata__":
                    yield MergedTensor(name, tuple(entry["shape"]), partial(self.read, file, name))

    def read(self, file: Path, name: str) -> Tensor:
        """Return a tensor: float32 where LoRA changes it, else in the stored dtype."""
        return self._merge(file, name, _stored(file, name))

    def _merge(self, file: Path, name: str, stored: Tensor) -> Tensor:
        if self.requantize is not None:
            stored = self.requantize(name, stored, lambda part: _stored(self._files[part], part))
        update = self.updates[file].get(name)
        if update is None:
            return stored
        return update.apply_to(stored.float() if isinstance(update, LoraDelta) else stored)

    def write(self, file: Path, target: Path) -> None:
        """Write a copy of a weight file with the merged tensors, one in memory at a time. Raises OSError."""
        shutil.copyfile(file, target)
        start, entries = read_header(file)
        rounded = (name for name in entries if self.requantize and self.requantize.quantizes(name))
        with target.open("r+b") as copy:
            for name in dict.fromkeys([*rounded, *self.updates[file]]):
                stored = _stored(file, name)
                merged = self._merge(file, name, stored).to(stored.dtype)
                begin, end = entries[name]["data_offsets"]
                assert merged.nbytes == end - begin
                copy.seek(start + begin)
                copy.write(merged.contiguous().view(-1).view(torch.uint8).numpy().data)

    @cached_property
    def _files(self) -> dict[str, Path]:
        return {name: file for file in self.updates for name in read_header(file)[1]}


def merged_weights(recipe: Recipe, adapter: Path, on_status: StatusFn = lambda words: None) -> MergedWeights:
    """Return the weights of a recipe's base with the adapter of a folder. Raises UserError."""
    base = model_folder(recipe, on_status)
    if is_mxfp4(load_config(base / CONFIG)):
        raise UserError(
            "This base cannot be exported with its adapter",
            what=f"{base} stores its experts in 4-bit floats (MXFP4).",
            why="Merged models and files for llama.cpp are made from 16-bit weights.",
            fix="Export the adapter alone, as a folder: `qlora-tui export adapter RUN FOLDER`.",
        )
    return MergedWeights(base, placed_updates(recipe, adapter))


def _stored(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as content:
        # Copy: the original is a view of the mapped file.
        tensor: Tensor = content.get_tensor(name).clone()
        return tensor


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
