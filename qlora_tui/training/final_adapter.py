"""Writes the result, ``adapter/``, which plain peft can load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from qlora_tui.catalog.model_validation import TOKENIZER_FILES
from qlora_tui.checksums import checked_folder, digest
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir
from qlora_tui.training import checkpoints
from qlora_tui.training.trainer import load_adapter, save_adapter

_FILES = (*TOKENIZER_FILES, "generation_config.json")
_TEMPLATES = "additional_chat_templates"
_TEMPLATE = "chat_template.jinja"


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
        for name in _FILES:
            if (model_folder / name).is_file():
                shutil.copyfile(model_folder / name, draft / name)
        if tokenizer.has_own_template:
            if (model_folder / _TEMPLATES).is_dir():
                shutil.copytree(model_folder / _TEMPLATES, draft / _TEMPLATES)
        else:
            (draft / _TEMPLATE).write_text(tokenizer.template.text)
        shutil.copyfile(run.recipe_path, draft / "recipe.toml")
    return digest(run.adapter_dir)
