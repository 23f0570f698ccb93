"""The base model's folder and weight files, and the tensors that an adapter's updates apply to."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from qlora_tui.adapters.deltas import (
    AdapterDeltas,
    EmbeddingRowDelta,
    ExpertDelta,
    FusedExpertDelta,
    LoraDelta,
    WholeMatrix,
    read_deltas,
    stored_experts,
)
from qlora_tui.catalog.architecture_types import OutputHead, inner_name
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.catalog.model_validation import read_header, weight_files
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training.gguf_conversion import cached_conversion, convert_cached

StatusFn = Callable[[str], None]
"""Gets the current activity, such as ``Loading the model``."""


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
    """Report progress every 10 %, because a terminal shows each status on a separate line."""
    reported = 0

    def report(done: int, total: int) -> None:
        nonlocal reported
        tenths = done * 10 // max(total, 1)
        if tenths > reported:
            reported = tenths
            on_status(f"{words}: {tenths * 10} %")

    return report


def placed_updates(recipe: Recipe, adapter: Path) -> dict[Path, AdapterDeltas]:
    """Return an adapter's updates by weight file of the recipe's model and tensor name. Raises UserError."""
    base = model_folder(recipe)
    files = [base / name for name in weight_files(base)]
    head = resolve_model(recipe.model.id).architecture.head
    return assign_deltas(with_tied_head(read_deltas(adapter), files, head), files, adapter)


def assign_deltas(deltas: AdapterDeltas, files: list[Path], adapter: Path) -> dict[Path, AdapterDeltas]:
    """Group updates by weight file and tensor name. Raises UserError for an update without a tensor.

    ``adapter`` is the folder of the updates, for the message.
    """
    shapes = {name: (file, shape) for file in files for name, shape in _shapes(file).items()}
    by_inner_name = {inner_name(name): name for name in shapes}
    placed: dict[Path, AdapterDeltas] = {file: {} for file in files}
    for module, update in _without_stacks(deltas, shapes).items():
        name = module if module in shapes else f"{module}.weight"
        if name not in shapes:
            # A text model inside a multimodal one is named with or without the outer part.
            name = by_inner_name.get(inner_name(name), name)
        if name not in shapes and isinstance(update, EmbeddingRowDelta):
            last = f".{module.rpartition('.')[2]}.weight"
            name = next((known for known in shapes if f".{known}".endswith(last)), name)
        file, shape = shapes.get(name, (Path(), ()))
        if not update.fits(shape):
            there = f"{shape} in the base and {update.shape} here" if shape else "the base has no such weight"
            raise UserError(
                "The adapter does not fit",
                what=f"{adapter} changes {module}: {there}.",
                why="It was trained on another model, or the base stores this weight in another layout.",
                fix="Choose the model it was trained on; its adapter_config.json names it.",
            )
        placed[file][name] = update
    return placed


def _without_stacks(deltas: AdapterDeltas, names: Collection[str]) -> AdapterDeltas:
    """Return the updates, with those of experts as updates of the tensors that the files have."""
    apart: AdapterDeltas = {}
    for module, update in deltas.items():
        stored = stored_experts(module, names, update.experts) if isinstance(update, ExpertDelta) else None
        if not isinstance(update, ExpertDelta) or stored is None:
            apart[module] = update
        elif stored.fused:
            apart[stored.fused] = FusedExpertDelta(update, stored.transposed)
        else:
            for expert, matrices in enumerate(stored.matrices):
                down, up = update.factors_of(expert)
                for name, rows in zip(matrices, up.chunk(len(matrices)), strict=True):
                    apart[name] = LoraDelta(down, rows, update.scale, None, transposed=False)
    return apart


def with_tied_head(deltas: AdapterDeltas, files: list[Path], head: OutputHead) -> AdapterDeltas:
    """Return the updates, with the embedding's also for a tied head that the files store separately.

    transformers ties two stored matrices only while they are equal. Raises UserError for an adapter that
    trained the two apart.
    """
    if not head.tied:
        return deltas
    is_stored = any(f"{head.name}.weight" in _shapes(file) for file in files)
    _require_tied(deltas, head)
    apart = {name: update for name, update in deltas.items() if name != head.name}
    of_embedding = next((u for u in apart.values() if isinstance(u, EmbeddingRowDelta | WholeMatrix)), None)
    return {head.name: of_embedding, **apart} if of_embedding and is_stored else apart


def _require_tied(deltas: AdapterDeltas, head: OutputHead) -> None:
    """Raise UserError where embedding and head, one matrix in the base, are not one in the adapter."""
    shape = (head.out_features, head.in_features)
    whole = {name: u.weight for name, u in deltas.items() if isinstance(u, WholeMatrix) and u.fits(shape)}
    own = whole.pop(head.name, None)
    if own is None and not whole:
        return
    if own is None or not whole or not all(own.equal(weight) for weight in whole.values()):
        raise UserError(
            "The adapter cannot be merged into this base",
            what="It trained embedding and head apart, and the base has one matrix for both.",
            fix="Use the adapter with peft, or train one with lora.train_embeddings, which keeps them one.",
        )


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(entry["shape"]) for name, entry in read_header(file)[1].items() if name != "__metadata__"
    }
