"""What two recipes disagree on, in words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from qlora_tui.recipe.diff import SettingChange, diff_recipes, format_value
from qlora_tui.recipe.schema import Data, Lora, Recipe, Source, Training
from tests.recipe.strategies import recipes


def test_changes_come_in_the_order_of_declaration() -> None:
    after = Recipe(training=Training(learning_rate=1e-5), lora=Lora(rank=2048 // 2, use_dora=True))
    assert diff_recipes(Recipe(), after) == [
        SettingChange("lora.rank", "16", "1,024"),
        SettingChange("lora.use_dora", "off", "on"),
        SettingChange("training.learning_rate", "0.0002", "1e-5"),
    ]
    assert str(diff_recipes(Recipe(), after)[0]) == "lora.rank: 16 → 1,024"


def test_sources_read_as_their_paths() -> None:
    sources = (Source(path="a.jsonl"), Source(path="b", format="text", columns={"prompt": "q"}, weight=2))
    [change] = diff_recipes(Recipe(), Recipe(data=Data(sources=sources)))
    assert (change.before, change.after) == ("none", "a.jsonl, b (text, prompt = q, weight 2)")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.1, "0.1"),
        (2.0, "2"),
        (1 / 3, repr(1 / 3)),
        (1e-10, "1e-10"),
        (2e20, "2e20"),
        (("q_proj", "8-23.k_proj"), "q_proj, 8-23.k_proj"),
        ("", "none"),
        ("cosine", "cosine"),
        ({}, "none"),
    ],
)
def test_values_read_as_a_person_writes_them(value: Any, words: str) -> None:
    assert format_value(value) == words


@given(recipes(), recipes())
def test_equal_recipes_alone_have_no_difference(a: Recipe, b: Recipe) -> None:
    assert diff_recipes(a, a) == []
    assert (diff_recipes(a, b) == []) == (a == b)
