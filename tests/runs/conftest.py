"""A run to play with: no model, no data, just a recipe and a directory."""

from __future__ import annotations

import pytest

from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.runs.directory import RunDir, create


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        name="tickets",
        model=Model(id="acme/tiny"),
        data=Data(sources=(Source(path="tickets.jsonl"),)),
    )


@pytest.fixture
def run(recipe: Recipe) -> RunDir:
    return create(recipe)
