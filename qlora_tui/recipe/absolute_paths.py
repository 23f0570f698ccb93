"""Paths in a recipe, made independent of the folder it was written in."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qlora_tui.recipe.schema import Recipe


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths of local files: a run trains in another working directory.

    Values that are not local files (such as a hub id) stay unchanged.
    """
    data = recipe.data
    return msgspec.structs.replace(
        recipe,
        model=msgspec.structs.replace(recipe.model, id=_absolute(recipe.model.id)),
        data=msgspec.structs.replace(
            data,
            sources=tuple(msgspec.structs.replace(s, path=_absolute(s.path)) for s in data.sources),
            validation_path=_absolute(data.validation_path),
        ),
    )


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if name and path.exists() else name
