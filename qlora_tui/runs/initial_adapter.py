"""The adapter that a run starts from (``lora.init_from``): a run by its name, or a folder.

An adapter that began with LoftQ holds the rounding errors of its 4-bit base however long it is trained. A run
that starts from it has ``lora.init_weights = "loftq"`` too, so that its exports take the same weights.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from qlora_tui.catalog.adapter_config import CONFIG
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import load, to_frozen_recipe
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
    """Return the recipe with the adapter's folder in place of a run's name, and how that adapter began.

    Raises UserError.
    """
    if not recipe.lora.init_from:
        return recipe
    folder = initial_adapter(recipe.lora.init_from)
    require_same_rounding(recipe, folder)
    lora = msgspec.structs.replace(recipe.lora, init_from=str(folder))
    if _is_loftq(recipe_of_adapter(folder)):
        lora = msgspec.structs.replace(lora, init_weights="loftq")
    return msgspec.structs.replace(recipe, lora=lora)


def recipe_of_adapter(folder: Path) -> Recipe | None:
    """Return the recipe that trained the adapter or checkpoint in ``folder``; None where it is not known."""
    run = RunDir(folder.parent.parent)
    path = run.recipe_path if folder.parent == run.checkpoints_dir else folder / "recipe.toml"
    try:
        return to_frozen_recipe(load(path), origin=str(path))
    except UserError:
        return None


def require_same_rounding(recipe: Recipe, folder: Path) -> None:
    """Raise UserError where only one of recipe and adapter is LoftQ's, or their 4-bit weights differ."""
    earlier = recipe_of_adapter(folder)
    if earlier is None or not _is_loftq(earlier):
        if not _is_loftq(recipe):
            return
        what = f'{folder} did not begin with LoftQ, and lora.init_weights is "loftq".'
        fix = 'Set lora.init_weights = "random", or clear Start from (lora.init_from).'
    else:
        ours, theirs = (
            (each.quantization.method, each.quantization.double_quantization) for each in (recipe, earlier)
        )
        if ours == theirs:
            return
        what = f"{folder} began as the rounding errors of other weights (LoftQ) than this recipe's."
        fix = (
            f'Set quantization.method = "{theirs[0]}" and quantization.double_quantization = '
            f"{str(theirs[1]).lower()}, or clear Start from (lora.init_from)."
        )
    raise UserError("The adapter does not match the recipe", what=what, fix=fix, exit_code=EXIT_USAGE)


def _is_loftq(recipe: Recipe | None) -> bool:
    return recipe is not None and recipe.lora.init_weights == "loftq"


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
