"""Writes the result, ``adapter/``, which plain peft can load."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch

from qlora_tui.catalog.model_validation import copy_files, is_template_file, tokenizer_files
from qlora_tui.checksums import checked_folder, digest
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir
from qlora_tui.training import checkpoints
from qlora_tui.training.health import OVERFLOW_REMEDY
from qlora_tui.training.trainer import load_adapter, save_adapter

_GENERATION = "generation_config.json"
_TEMPLATE = "chat_template.jinja"
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the size of a weight."""


def load_best_weights(run: RunDir, model: Any, step: int) -> str:
    """Load the adapter weights of the best step from its checkpoint.

    Returns:
        Which step the adapter is from, for the user. It stays that of the last step where the checkpoint of
        the best step is missing, as after a full disk.
    """
    folder = checkpoints.intact_folder(run, step)
    if folder is None:
        return (
            f"the adapter is from the last step, because the checkpoint of the best step, {step}, is missing"
        )
    load_adapter(model, folder)
    return f"the adapter is from the best step, {step}"


def trained_weights_digest(model: Any) -> str:
    """Return a digest of all trained weights, which is the same on every device."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Sums of the bits, as integers: a copy of a trained embedding would take gigabytes.
            bits = parameter.detach().view(_INTEGERS[parameter.element_size()])
            digest.update(f"{name} {int(bits.sum(dtype=torch.int64))} ".encode())
    return digest.hexdigest()


def require_trained(model: Any, initial_weights: str, steps: int, skipped: int) -> None:
    """Raise UserError where the trained weights are those from before the first step.

    Args:
        initial_weights: their digest; empty where it is unknown.
        steps: the steps of the run.
        skipped: how many of them fp16 skipped.
    """
    if trained_weights_digest(model) != initial_weights:
        return
    overflow = "The gradients overflowed float16, and such a step is skipped."
    raise UserError(
        "Training changed nothing",
        what=f"After {pluralize(steps, 'step')} the adapter is the one that training began with.",
        why=overflow if skipped else "The gradients were 0, or steps smaller than a weight can hold.",
        fix=OVERFLOW_REMEDY
        if skipped
        else "Check the loss masks on the Data screen, and raise training.learning_rate.",
    )


def write_adapter(
    run: RunDir, model: Any, recipe: Recipe, model_folder: Path, tokenizer: ChatTokenizer, *, from_hub: bool
) -> str:
    """Write adapter, tokenizer, chat template and recipe, on the disk on return; the hash of their checksums.

    An earlier adapter is deleted once the new one is in its place. Raises OSError when it cannot be written.
    ``from_hub``: the base is named by its hub id, so that the adapter finds it on other machines.
    """
    with checked_folder(run.adapter_dir) as draft:
        config = model.peft_config["default"]
        config.base_model_name_or_path = recipe.model.id if from_hub else str(model_folder)
        config.revision = recipe.model.revision if from_hub else None
        save_adapter(model, draft)
        names = tokenizer_files(model_folder)
        if (model_folder / _GENERATION).is_file():
            names.append(_GENERATION)
        if not tokenizer.has_own_template:
            names = [name for name in names if not is_template_file(name)]
            (draft / _TEMPLATE).write_text(tokenizer.template.text)
        copy_files(model_folder, draft, names)
        shutil.copyfile(run.recipe_path, draft / "recipe.toml")
    return digest(run.adapter_dir)
