"""The adapter that a run starts from (``lora.init_from``): a run by its name, or a folder."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qlora_tui.catalog.adapter_config import CONFIG
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir, find_run


def initial_adapter(init_from: str) -> Path:
    """Return the absolute folder of the adapter that ``lora.init_from`` names.

    Args:
        init_from: a folder with an adapter, a run's folder, or a run by id or name.

    Raises:
        UserError: there is no such adapter, or the run has not saved one yet.
    """
    folder = Path(init_from).expanduser()
    if (folder / CONFIG).is_file():
        return folder.resolve()
    if folder.is_dir():
        run = RunDir(folder.resolve())
        if not run.recipe_path.is_file():
            raise _missing(init_from, f"{folder} holds no {CONFIG}.")
    elif folder.is_absolute():
        raise _missing(init_from, f"{folder} does not exist.")
    else:
        run = find_run(init_from)
    if not (run.adapter_dir / CONFIG).is_file():
        raise _missing(init_from, f"{run.id} has not saved an adapter.")
    return run.adapter_dir


def with_initial_adapter(recipe: Recipe) -> Recipe:
    """Return the recipe with the adapter's folder in place of a run's name. Raises UserError."""
    if not recipe.lora.init_from:
        return recipe
    folder = str(initial_adapter(recipe.lora.init_from))
    return msgspec.structs.replace(recipe, lora=msgspec.structs.replace(recipe.lora, init_from=folder))


def _missing(init_from: str, what: str) -> UserError:
    return UserError(
        "No adapter to start from",
        what=f"Start from (lora.init_from) is {init_from!r}: {what}",
        fix="Name a run that has finished, or the folder of an adapter; a checkpoint is one too.",
        exit_code=EXIT_USAGE,
    )
