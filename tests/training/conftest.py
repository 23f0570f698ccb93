"""A tiny model and a little data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Lora, Model, Quantization, Recipe, Source
from qlora_tui.recipe.training_settings import Training
from tests.training.tiny_model import make_tiny_model

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty short conversations."""
    file = tmp_path_factory.mktemp("data") / "facts.jsonl"
    with file.open("w") as lines:
        for i in range(30):
            messages = [
                {"role": "user", "content": f"what is {i}"},
                {"role": "assistant", "content": f"the answer is {i * 7 % 13} and {'fox ' * (i % 9)}"},
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return file


@pytest.fixture
def recipe(tiny_model: Path, tiny_data: Path) -> MakeRecipe:
    """Makes a recipe that trains in a second or two: ``recipe({"training.epochs": 3})`` changes settings."""

    def make(settings: dict[str, Any] | None = None) -> Recipe:
        changed = Recipe(
            model=Model(id=str(tiny_model)),
            # Whatever the CPU is quickest at: losses are compared to more digits than 16 bits have.
            quantization=Quantization(compute_dtype="float32"),
            lora=Lora(rank=8, alpha=16),
            data=Data(sources=(Source(path=str(tiny_data)),), max_length=128, validation_fraction=0.1),
            training=Training(
                optimizer="adamw",
                learning_rate=2e-3,
                gradient_accumulation=2,
                epochs=2,
                gradient_checkpointing="off",
                general_prompts=0,
            ),
        )
        for path, value in (settings or {}).items():
            changed = replace_setting(changed, path, value)
        return changed

    return make
