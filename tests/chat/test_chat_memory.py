"""The memory of a chat: that of its model, whatever the run's training took."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.chat import chat_sources
from qlora_tui.chat.chat_sources import chat_fits
from qlora_tui.memory import Device
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Model, Recipe
from tests.tui.workstation import config_of

GIB = 1 << 30


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A run of Qwen2.5-7B whose training needs much more memory than a chat."""
    files = SimpleNamespace(architecture=parse_architecture(config_of("Qwen__Qwen2.5-7B")))
    monkeypatch.setattr(chat_sources, "resolve_model", lambda model_id: files)
    return replace_setting(Recipe(model=Model(id="qwen")), "training.micro_batch_size", 64)


@pytest.mark.parametrize(("method", "too_little", "enough"), [("nf4", 5, 8), ("none", 14, 17)])
def test_the_chat_needs_its_model_and_not_the_runs_batch(
    recipe: Recipe, method: str, too_little: int, enough: int
) -> None:
    recipe = replace_setting(recipe, "quantization.method", method)
    assert not chat_fits(recipe, Device(), too_little * GIB)
    assert chat_fits(recipe, Device(), enough * GIB)


def test_a_model_that_is_not_here_never_fits() -> None:
    assert not chat_fits(Recipe(model=Model(id="org/none")), Device(), 1 << 50)
