"""The base model's folder and weight files, and the tensors that an adapter's updates apply to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from qlora_tui.adapters.deltas import (
    AdapterDeltas,
    EmbeddingRowDelta,
    ExpertDelta,
    LoraDelta,
    Update,
    WholeMatrix,
    read_deltas,
)
from qlora_tui.adapters.stored_layout import StoredLayout, TensorGroup
from qlora_tui.adapters.weight_files import read_tensor, stored_tensors
from qlora_tui.catalog.architecture_types import OutputHead
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.catalog.model_validation import weight_files
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training.gguf_conversion import cached_conversion, convert_cached

StatusFn = Callable[[str], None]
"""Receives the current activity, such as ``Loading the model``."""


def model_folder(recipe: Recipe, on_status: StatusFn = lambda words: None) -> Path:
    """Return the folder with the recipe's model, converting a GGUF file first. Raises UserError."""
    files = resolve_model(recipe.model.id)
    if files.gguf_file is None:
        return files.folder
    file = files.folder / files.gguf_file
    if (converted := cached_conversion(file)) is not None:
        return converted
    words = f"Converting {file.name}"
    on_status(words)
    return convert_cached(file, every_tenth(on_status, words))


def every_tenth(on_status: StatusFn, words: str) -> Callable[[int, int], None]:
    """Return a function that reports progress every 10 %, because a terminal shows each status on its own
    line.
    """
    reported = 0

    def report(done: int, total: int) -> None:
        nonlocal reported
        tenths = done * 10 // max(total, 1)
        if tenths > reported:
            reported = tenths
            on_status(f"{words}: {tenths * 10}%")

    return report


@dataclass(frozen=True, eq=False)
class ConvertedDelta:
    """Update of one tensor in a group of stored tensors that transformers converts together."""

    layout: StoredLayout
    group: TensorGroup
    updates: AdapterDeltas
    """Updates of the parameters of the group."""
    file_of: Mapping[str, Path]
    """Weight file of each stored tensor."""
    name: str
    """Name of the tensor in its file."""

    def apply_to(self, weight: Tensor) -> Tensor:
        """Return the merged tensor, in the dtype of ``weight``.

        The values of ``weight`` are ignored, because all tensors of the group are read and merged together.
        """
        return self.merged(as_stored)[self.name].to(weight.dtype)

    def merged(self, round_parameter: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the merged tensors of the group in float32. The result for the last group is cached.

        ``round_parameter`` returns the values to which an update is added, given the name and values of a
        parameter.
        """
        last = self.layout.last_merged
        if last is None or last[:2] != (self.group, round_parameter):
            last = self.layout.last_merged = None  # cleared first, because both results may be large
            last = self.layout.last_merged = (self.group, round_parameter, self._merge(round_parameter))
        return last[2]

    def _merge(self, round_parameter: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        def change(parameter: str, values: Tensor) -> Tensor:
            wide = round_parameter(parameter, values).float()
            update = self.updates.get(parameter)
            return wide if update is None else update.apply_to(wide)

        stored = {name: read_tensor(self.file_of[name], name) for name in self.group.stored}
        parameters = self.layout.to_model(self.group, stored)
        return self.layout.to_files(
            self.group, {name: change(name, values) for name, values in parameters.items()}
        )


def as_stored(_parameter: str, values: Tensor) -> Tensor:
    """Return the values of a parameter unchanged."""
    return values


SHARED_WEIGHT = "shared weight"
"""Code of the error for an adapter on a weight that several layers share."""
PlacedDeltas: TypeAlias = dict[str, Update | ConvertedDelta]
"""Updates by the name of a tensor in a weight file."""


def placed_updates(recipe: Recipe, adapter: Path) -> dict[Path, PlacedDeltas]:
    """Return an adapter's updates, by weight file of the model and then by tensor name. Raises UserError."""
    base = model_folder(recipe)
    files = [base / name for name in weight_files(base)]
    head = resolve_model(recipe.model.id).architecture.head
    deltas = with_tied_head(read_deltas(adapter), files, head)
    return assign_deltas(deltas, files, adapter, StoredLayout(base))


def assign_deltas(
    deltas: AdapterDeltas, files: list[Path], adapter: Path, layout: StoredLayout
) -> dict[Path, PlacedDeltas]:
    """Group updates by weight file and tensor name.

    Raises UserError for an update that fits no tensor, or that changes a weight that layers share. The error
    names ``adapter``, the folder that the updates come from.
    """
    file_of = {name: file for file in files for name in stored_tensors(file)}
    placed: dict[Path, PlacedDeltas] = {file: {} for file in files}
    converted: dict[TensorGroup, AdapterDeltas] = {}
    for module, update in deltas.items():
        parameter = layout.parameter_of(module)
        if parameter is None and isinstance(update, EmbeddingRowDelta):
            last = f".{module.rpartition('.')[2]}.weight"
            parameter = next((known for known in layout.by_parameter if known.endswith(last)), None)
        if parameter is None and f"{module}.weight" in file_of:
            # A tied head that the files store separately.
            placed[file_of[f"{module}.weight"]][f"{module}.weight"] = update
            continue
        if not isinstance(update, EmbeddingRowDelta | WholeMatrix):
            _require_own_weight(layout, parameter or f"{module}.weight")
        shape = () if parameter is None else tuple(layout.by_parameter[parameter].parameters[parameter])
        if parameter is not None and isinstance(update, ExpertDelta | LoraDelta):
            update = replace(update, transposed=layout.is_transposed(parameter))
        if parameter is None or not update.fits(shape):
            there = (
                f"{shape} in the base and {update.shape} in the adapter"
                if shape
                else "the base has no such weight"
            )
            raise UserError(
                "The adapter does not fit",
                what=f"{adapter} changes {module}: {there}.",
                why="The adapter was trained on another model, or the base stores this weight in another "
                "layout.",
                fix="Choose the model that the adapter was trained on; its adapter_config.json names this "
                "model.",
            )
        group = layout.by_parameter[parameter]
        if group.is_converted:
            converted.setdefault(group, {})[parameter] = update
        else:
            (name,) = group.stored
            placed[file_of[name]][name] = update
    for group, updates in converted.items():
        for name in group.stored:
            placed[file_of[name]][name] = ConvertedDelta(layout, group, updates, file_of, name)
    return placed


def _require_own_weight(layout: StoredLayout, parameter: str) -> None:
    """Raise UserError for a weight that layers share (Zamba): an adapter changes each use separately."""
    if (other := layout.shared.get(parameter)) is not None:
        raise UserError(
            "The adapter cannot be merged into this base",
            what=f"The base has one weight for {parameter} and {other}; the adapter changes each use "
            "separately.",
            why="A merged weight would be the same for both uses.",
            fix="Use the adapter with peft, or in Chat.",
            code=SHARED_WEIGHT,
        )


def with_tied_head(deltas: AdapterDeltas, files: list[Path], head: OutputHead) -> AdapterDeltas:
    """Return the updates, adjusted for a head that is tied to the embedding.

    The tied head's own update is left out. If the files store this head separately, it gets the embedding's
    update. transformers ties two stored matrices only while they are equal. Raises UserError for an adapter
    that trained the two matrices separately.
    """
    if not head.tied:
        return deltas
    is_stored = any(f"{head.name}.weight" in stored_tensors(file) for file in files)
    _require_tied(deltas, head)
    apart = {name: update for name, update in deltas.items() if name != head.name}
    of_embedding = next((u for u in apart.values() if isinstance(u, EmbeddingRowDelta | WholeMatrix)), None)
    return {head.name: of_embedding, **apart} if of_embedding and is_stored else apart


def _require_tied(deltas: AdapterDeltas, head: OutputHead) -> None:
    """Raise UserError if embedding and head are one matrix in the base, but not in the adapter."""
    shape = (head.out_features, head.in_features)
    whole = {name: u.weight for name, u in deltas.items() if isinstance(u, WholeMatrix) and u.fits(shape)}
    own = whole.pop(head.name, None)
    if own is None and not whole:
        return
    if own is None or not whole or not all(own.equal(weight) for weight in whole.values()):
        raise UserError(
            "The adapter cannot be merged into this base",
            what="The adapter trained embedding and head separately, but the base has one matrix for both.",
            fix="Use the adapter with peft, or train an adapter with lora.train_embeddings, which keeps "
            "them tied.",
        )
