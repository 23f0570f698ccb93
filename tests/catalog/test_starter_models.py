"""The models worth starting with have the sizes that were published."""

from __future__ import annotations

import math

import pytest

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.catalog.starter_models import StarterModel, starter_file
from tests.catalog.configs import CONFIGS

MODELS = (starter_file().demo, *starter_file().models)
PUBLISHED = {
    "SmolLM2-135M-Instruct": "HuggingFaceTB__SmolLM2-135M",
    "Qwen/Qwen3-0.6B": "Qwen__Qwen3-0.6B",
    "Qwen/Qwen3.6-27B": "Qwen__Qwen3.5-27B",
    "Qwen/Qwen3.6-35B-A3B": "Qwen__Qwen3.5-35B-A3B",
    "HuggingFaceTB/SmolLM3-3B": "HuggingFaceTB__SmolLM3-3B",
    "LiquidAI/LFM2.5-1.2B-Instruct": "LiquidAI__LFM2-1.2B",
    "openai/gpt-oss-20b": "openai__gpt-oss-20b",
}
"""Configs of ``tests/configs`` with the same architecture."""


def test_they_go_from_small_to_large_and_each_is_there_once() -> None:
    assert [model.billions for model in MODELS] == sorted(model.billions for model in MODELS)
    assert len({model.id for model in MODELS}) == len(MODELS)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)
def test_its_shapes_add_up_to_the_published_size(model: StarterModel) -> None:
    parameters = model.architecture().total_params
    assert math.isclose(parameters / 1e9, model.billions, rel_tol=0.07), parameters


@pytest.mark.parametrize(("model", "name"), PUBLISHED.items())
def test_its_modules_are_those_of_the_published_config(model: str, name: str) -> None:
    starter = next(each for each in MODELS if each.id == model).architecture()
    published = parse_architecture(CONFIGS / f"{name}.json")
    text = [module for module in published.modules if module.part != "vision"]
    assert [module for module in starter.modules if module.part != "vision"] == text
