"""One micro-batch through a model as a run has it: base, adapter, fast paths, checkpointing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training import model as model_loading
from qlora_tui.training.adapter import add_lora
from qlora_tui.training.batches import on_device
from qlora_tui.training.compute_device import ComputeDevice, choose_attention, find_device
from qlora_tui.training.loss import IGNORED, loss_positions
from qlora_tui.training.model import PreparedBase, prepare_base

_LEAST_TOKEN, _MOST_TOKEN = 3, 500
"""Bounds of the random token ids, which every vocabulary has."""


@dataclass(frozen=True)
class StepModel:
    """A model that trains, and the device that it is on."""

    model: Any
    base: PreparedBase
    device: ComputeDevice

    def run(self, lengths: list[int], *, packed: bool = True) -> None:
        """Compute loss and gradients of samples of these lengths, every second token of which is trained.

        Args:
            lengths: Tokens of each sample.
            packed: One row of all samples, as the trainer does; else a row each, of equal lengths.
        """
        ids = torch.randint(_LEAST_TOKEN, _MOST_TOKEN, (1, sum(lengths)))
        batch: dict[str, Any] = {"segments": lengths}
        if packed:
            batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        else:
            ids = ids.view(len(lengths), -1)
            batch = {"attention_mask": torch.ones_like(ids)}
        labels = ids.clone()
        labels[:, ::2] = IGNORED
        batch |= {"input_ids": ids, "labels": labels, "loss_positions": loss_positions(labels)}
        loss = self.model(**on_device(batch, self.device.torch_device), num_items_in_batch=1).loss
        loss.backward()
        for parameter in self.model.parameters():
            parameter.grad = None


def load_step_model(folder: Path, recipe: Recipe) -> StepModel:
    """Load the model as the trainer does before its first step. Raises UserError."""
    device = find_device(recipe)
    base = prepare_base(folder, recipe, device, choose_attention(recipe, device), "chunked", weighted=False)
    model = add_lora(base.model, recipe.lora, resolve_model(str(folder)).architecture)
    if recipe.training.gradient_checkpointing != "off":
        model_loading.checkpoint_activations(base.model)
    return StepModel(model.train(), base, device)
