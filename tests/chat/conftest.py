"""One tiny model and its adapters for the whole room."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.chat.terms import ChatSource
from qlora_tui.recipe.schema import Model, Recipe
from tests.chat.adapters import make_adapter
from tests.training.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_source(tiny_model: Path) -> ChatSource:
    """The tiny model with two adapters: ``adapter`` and ``step-2``."""
    adapters = {
        "adapter": str(make_adapter(tiny_model, tiny_model.parent / "adapter", seed=1)),
        "step-2": str(make_adapter(tiny_model, tiny_model.parent / "step-2", seed=2)),
    }
    return ChatSource(recipe=Recipe(model=Model(id=str(tiny_model))), adapters=adapters)
