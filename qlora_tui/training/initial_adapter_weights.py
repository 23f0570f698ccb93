"""Starts a run from the weights of another adapter (``lora.init_from``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qlora_tui.catalog.adapter_config import WEIGHTS, load_adapter_config
from qlora_tui.catalog.adapter_fit import misfit, require_fit
from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Lora
from qlora_tui.runs.damage import checksum_damage


def load_initial_adapter(model: Any, lora: Lora, architecture: Architecture) -> None:
    """Replace the weights of a new adapter by those in the folder ``lora.init_from``, which is only read.

    Raises:
        UserError: they are damaged, or not of the same modules, shapes and tokens.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    folder = Path(lora.init_from)
    require_fit(folder, lora, architecture)
    if damage := checksum_damage(folder):
        raise _damaged(folder, damage)
    tokens = load_adapter_config(folder).get("trainable_token_indices")
    if tokens != model.peft_config["default"].trainable_token_indices:
        raise misfit(folder, "it trains the rows of other tokens (lora.trainable_tokens)")
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, str(error)) from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(expected.keys() ^ weights.keys()):
        raise misfit(folder, f"only {'the recipe' if name in expected else 'it'} has {name}")
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            raise misfit(folder, f"{name} has the shape {shapes}")
    set_peft_model_state_dict(model, weights)


def _damaged(folder: Path, damage: str) -> UserError:
    return UserError(
        "The adapter is damaged",
        what=f"{folder}: {damage}.",
        why="It has changed since it was written; a disk or copy error is the usual cause.",
        fix="Start from another adapter, or from a checkpoint of its run.",
    )
