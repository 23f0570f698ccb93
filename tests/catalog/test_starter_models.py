"""The models worth starting with have the shapes of their published configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.catalog.starter_models import STARTER_MODELS, StarterModel

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("model", STARTER_MODELS, ids=lambda model: model.id)
def test_its_modules_are_those_of_the_published_config(model: StarterModel) -> None:
    name = model.id.removesuffix("-Instruct").replace("/", "__")
    published, starter = parse_architecture(CONFIGS / f"{name}.json"), model.architecture()
    assert starter.modules == published.modules
    assert starter.total_params == published.total_params
