"""One tiny model and its adapters for the whole room."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.recipe.schema import Model, Quantization, Recipe
from tests.chat.adapters import make_adapter
from tests.training.tiny_model import make_tiny_model


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
    # Whatever the CPU is quickest at: figures are compared to more digits than 16 bits have.
    recipe = Recipe(model=Model(id=str(tiny_model)), quantization=Quantization(compute_dtype="float32"))
    return ChatSource(recipe=recipe, adapters=adapters)
