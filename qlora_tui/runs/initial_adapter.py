"""The adapter that a run starts from (``lora.init_from``): a run by its name, or a folder."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qlora_tui.catalog.adapters import CONFIG
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.recipe.errors import InvalidRecipeError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import load, to_frozen_recipe
from qlora_tui.runs.directory import RunDir, find_run


def initial_adapter(init_from: str) -> Path:
    """Return the absolute folder of the adapter that ``lora.init_from`` names.

    Args:
        init_from: a folder with an adapter, a run's folder, or a run by id or name.

    Raises:
        UserError: there is no such adapter, the run has not saved one yet, or what the adapter computes is
            not known, because its recipe has other settings under ``[lora]`` than this version.
    """
    folder = _folder_of(init_from)
    recipe_of_adapter(folder)
    return folder


def _folder_of(init_from: str) -> Path:
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
    """Return the recipe with the adapter's folder in place of a run's name.

    Raises UserError.
    """
    if not recipe.lora.init_from:
        return recipe
    folder = initial_adapter(recipe.lora.init_from)
    lora = msgspec.structs.replace(recipe.lora, init_from=str(folder))
    return msgspec.structs.replace(recipe, lora=lora)


def recipe_of_adapter(folder: Path) -> Recipe | None:
    """Return the recipe that trained the adapter or checkpoint in ``folder``; None where it is not known.

    Raises InvalidRecipeError where its settings under ``[lora]`` cannot be read.
    """
    run = RunDir(folder.parent.parent)
    path = run.recipe_path if folder.parent == run.checkpoints_dir else folder / "recipe.toml"
    try:
        return to_frozen_recipe(load(path), origin=str(path))
    except InvalidRecipeError as error:
        if any(issue.path.startswith("lora.") for issue in error.issues):
            raise
        return None
    except UserError:
        return None


def _missing(init_from: str, what: str) -> UserError:
    from qlora_tui.runs import trash  # which deletes through actions, which start runs from adapters

    fix = "Name a run that has finished, or the folder of an adapter; a checkpoint is one too."
    for each in trash.trashed_runs():
        if each.run.id in (init_from, *Path(init_from).parts):
            what = f"{what} {each.run.name} is in the trash."
            fix = f"`qlora-tui runs restore {each.run.id}` brings it back."
    return UserError(
        "No adapter to start from",
        what=f"Start from (lora.init_from) is {init_from!r}: {what}",
        fix=fix,
        exit_code=EXIT_USAGE,
    )
