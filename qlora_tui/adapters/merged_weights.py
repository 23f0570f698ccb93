"""The weights of a base with an adapter merged in, one tensor at a time.

The base weights may be the stored 16-bit weights, or these weights as they were in training: quantized to 4
bits by bitsandbytes, and dequantized (:class:`Requantizer`). An adapter that learned on 4-bit weights also
learned to compensate for their rounding errors, and may answer differently on the 16-bit weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from qlora_tui.adapters.base_weights import (
    ConvertedDelta,
    PlacedDeltas,
    StatusFn,
    as_stored,
    model_folder,
    placed_updates,
)
from qlora_tui.adapters.deltas import LoraDelta
from qlora_tui.adapters.stored_layout import StoredLayout
from qlora_tui.adapters.weight_files import read_tensor, stored_tensors, write_unpacked
from qlora_tui.catalog.architecture_types import Architecture, inner_name
from qlora_tui.catalog.model_validation import read_header
from qlora_tui.memory.weights import quantized_experts, quantizes
from qlora_tui.recipe.schema import Quantization, Recipe
from qlora_tui.training.experts.storage import round_to_4_bits

_STACKED = 3
"""Number of dimensions of a parameter that holds a matrix for each expert."""


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of a weight file."""

    name: str
    """Name of the tensor in the weight file."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Returns the values, like :meth:`MergedWeights.read`."""


@dataclass(frozen=True)
class MergedWeights:
    """The base's weight files, with the adapter's update of each tensor."""

    folder: Path
    """Folder of the base."""
    updates: dict[Path, PlacedDeltas]
    """Updates by weight file, then by tensor name."""
    requantize: Requantizer | None = None
    """Rounds a parameter as quantization did in training; None keeps the stored values."""

    @property
    def bytes(self) -> int:
        """Total size of all tensors."""
        return sum(tensor.bytes for file in self.updates for tensor in stored_tensors(file).values())

    @property
    def changed(self) -> int:
        """Number of tensors that the adapter changes."""
        return sum(map(len, self.updates.values()))

    def __iter__(self) -> Iterator[MergedTensor]:
        """Yield every tensor, in the order of the files."""
        for file in self.updates:
            for name, tensor in stored_tensors(file).items():
                yield MergedTensor(name, tensor.shape, partial(self.read, file, name))

    def read(self, file: Path, name: str) -> Tensor:
        """Return the values of a tensor, with the update of the adapter.

        The dtype is float32 if LoRA changes the tensor as a single matrix, or if the tensor was converted to
        parameters of the model in order to update or round them. Otherwise it is the stored dtype.
        """
        return self._merge(file, name, read_tensor(file, name))

    def _merge(self, file: Path, name: str, stored: Tensor) -> Tensor:
        update = self.updates[file].get(name)
        if self.requantize is not None and self._is_rounded(name):
            group = self._layout.by_stored[name]
            if not group.is_converted:
                stored = self.requantize(next(iter(group.parameters)), stored)
            elif update is None:
                update = ConvertedDelta(self._layout, group, {}, self._file_of, name)
        if update is None:
            return stored
        if isinstance(update, ConvertedDelta):
            return update.merged(self.requantize or as_stored)[name]
        return update.apply_to(stored.float() if isinstance(update, LoraDelta) else stored)

    def _is_rounded(self, name: str) -> bool:
        if self.requantize is None or (group := self._layout.by_stored.get(name)) is None:
            return False
        return any(map(self.requantize.quantizes, group.parameters))

    def write(self, file: Path, target: Path) -> None:
        """Write a copy of a weight file with merged tensors. Raises OSError.

        Memory holds one tensor at a time, or one group of tensors that are converted together.
        """
        if any(tensor.is_packed for tensor in stored_tensors(file).values()):
            write_unpacked(file, target, partial(self.read, file))
            return
        shutil.copyfile(file, target)
        start, entries = read_header(file)
        rounded = (name for name in entries if self._is_rounded(name))
        with target.open("r+b") as copy:
            for name in dict.fromkeys([*rounded, *self.updates[file]]):
                stored = read_tensor(file, name)
                merged = self._merge(file, name, stored).to(stored.dtype)
                begin, end = entries[name]["data_offsets"]
                assert merged.nbytes == end - begin
                copy.seek(start + begin)
                copy.write(merged.contiguous().view(-1).view(torch.uint8).numpy().data)

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        return {name: file for file in self.updates for name in stored_tensors(file)}

    @cached_property
    def _layout(self) -> StoredLayout:
        return StoredLayout(self.folder)


def merged_weights(recipe: Recipe, adapter: Path, on_status: StatusFn = lambda words: None) -> MergedWeights:
    """Return the weights of a recipe's base, merged with the adapter in a folder. Raises UserError."""
    base = model_folder(recipe, on_status)
    return MergedWeights(base, placed_updates(recipe, adapter))


@dataclass(frozen=True)
class Requantizer:
    """Rounds the values of a parameter to 4 bits as in training, given its name in the model."""

    settings: Quantization
    tails: frozenset[str]
    """Names of the text model's weights that training quantizes. Each name begins at ``layers.``."""
    towers: frozenset[str] = frozenset()
    """Names of modules that read images. Each is one component of a dotted parameter name."""
    experts: frozenset[str] = frozenset()
    """Names of the experts' parameters that training quantizes. Each name begins at ``layers.``."""

    def quantizes(self, name: str) -> bool:
        """Return whether a parameter of the model is rounded.

        Modules that read images are not rounded, although training quantizes them: text never passes through
        them, so an adapter cannot compensate for their rounding.
        """
        return inner_name(name) in self.tails | self.experts and self.towers.isdisjoint(name.split("."))

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """Return the rounded values of a parameter; unchanged if training does not quantize it."""
        if not self.quantizes(name):
            return weight
        if weight.dim() == _STACKED:
            return torch.stack([round_to_4_bits(matrix, self.settings) for matrix in weight])
        return round_to_4_bits(weight, self.settings)


def requantizer(architecture: Architecture, settings: Quantization) -> Requantizer | None:
    """Return a function that rounds weights as in training; None for a method without 4-bit weights."""
    if settings.method not in ("nf4", "fp4"):
        return None
    text = [module for module in architecture.modules if module.part != "vision"]
    quantized = (inner_name(f"{module.name}.weight") for module in text if quantizes(settings, module))
    towers = (
        module.name.removeprefix("model.").partition(".")[0]
        for module in architecture.modules
        if module.part == "vision"
    )
    has_quantized_experts = quantized_experts(settings, architecture) != "none"
    experts = (inner_name(module.name) for module in architecture.expert_modules if has_quantized_experts)
    return Requantizer(settings, frozenset(quantized), frozenset(towers), frozenset(experts))
