"""A tiny random Llama, and conversations for it: real files, made once a session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_tui.recipe.layering import build_recipe
from qlora_tui.recipe.schema import Recipe
from tests.training.tiny_model import make_tiny_model

COLORS = ("red", "blue", "green", "brown", "quick", "lazy", "wise", "old")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """Forty questions and answers."""
    path = tmp_path / "colors.jsonl"
    with path.open("w") as file:
        for number in range(40):
            color = COLORS[number % len(COLORS)]
            question = f"what is the colour of fox {number}?"
            answer = f"the fox is {color} and so are the owls {number}"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture
def tiny_recipe(tiny_model: Path, conversations: Path) -> Recipe:
    """Trains in milliseconds a step."""
    return build_recipe(
        preset="cpu-demo",
        model=str(tiny_model),
        data=[str(conversations)],
        sets=["name=tiny", "lora.rank=4", "data.max_length=128", "training.epochs=3"],
    )
