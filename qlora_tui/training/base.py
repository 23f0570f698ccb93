"""The base model as LoRA is added to it: loaded, its loss and its attention in place, both proved on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.memory.execution import Loss
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training import checks, load, loss
from qlora_tui.training.device import Attention, Device
from qlora_tui.training.liger import proven_liger

_NAMES: dict[Attention, str] = {"segments": "SDPA", "flash": "flash", "eager": "eager"}
_NOT_WEIGHTED = "tokens of this data count for more or less, which Liger does not know"


@dataclass(frozen=True)
class Base:
    """What a run trains on."""

    model: Any
    folder: Path
    attention: str
    """As the run's record names it."""
    loss: str
    """The one counted on, or another and why."""
    kept_apart: bool
    """Whether several samples may share a row."""
    attends: Attention
    """The attention path that was tried first."""
    library_attention: str
    """The implementation that transformers uses for one sample by itself: ``sdpa`` or ``eager``."""
    replaced: tuple[str, ...] = ()
    """Fast paths that computed something else on this model, and are not used."""


def prepare_base(
    folder: Path, recipe: Recipe, device: Device, attends: Attention, counted_on: Loss, *, weighted: bool
) -> Base:
    """Load it with the loss that the estimate counts on where that is proved exact, else with another.

    ``weighted``: some tokens of the data count for more or less than others.
    """
    model = load.load_base(folder, recipe, device, attends)
    head = loss.find_head(model)
    if not isinstance(head, str) and not checks.loss_is_exact(model, head, device.torch_device):
        head = "what it does between head and loss is not known"
    library_attention = _library_attention(model, attends)
    kept_apart = attends == "flash" or (attends == "segments" and load.attend_by_segments(model))
    taken = _use_loss(model, head, device, counted_on, weighted)
    loss.use_segments(model, by_mask=attends == "segments")
    if kept_apart and not checks.samples_are_kept_apart(model, device.torch_device):
        kept_apart = False
        if attends == "segments":
            # Padded rows do not need our attention, and the check of the first step needs the library's.
            load.attend_by(model, library_attention)
    return Base(
        model=model,
        folder=folder,
        attention=f"{_NAMES[attends]}, {'sample by sample' if kept_apart else 'padded rows'}",
        loss=taken,
        kept_apart=kept_apart,
        attends=attends,
        library_attention=library_attention,
    )


def _library_attention(model: Any, attends: Attention) -> str:
    """Flash kernels are no reference for themselves: SDPA is, or what families have that lack it."""
    loaded: str = model.config._attn_implementation
    if attends != "flash":
        return loaded
    reference = "sdpa" if load.attend_by(model, "sdpa") else "eager"
    load.attend_by(model, loaded)
    return reference


def _use_loss(model: Any, head: loss.Head | str, device: Device, counted_on: Loss, weighted: bool) -> str:
    """Give the model its loss; what the run's record says of it."""
    if isinstance(head, str):
        loss.weigh_stock_loss(model)
        return f"stock: {head}"
    kernel: loss.SummedLoss | str | None = None
    if counted_on == "liger":
        kernel = _NOT_WEIGHTED if weighted else proven_liger(head, device.torch_device)
    if isinstance(kernel, str):
        loss.use_chunked_loss(model, head)
        return f"chunked: {kernel}"
    loss.use_chunked_loss(model, head, kernel)
    return counted_on
