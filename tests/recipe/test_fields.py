"""The settings as data.

What two recipes disagree on, in words.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.recipe.fields import (
    SettingChange,
    diff_recipes,
    fields,
    format_value,
    get_setting,
    label_settings,
    replace_setting,
)
from qlora_tui.recipe.schema import Data, Lora, Recipe, Source
from qlora_tui.recipe.training_settings import Training
from tests.recipe.strategies import recipes, values


def test_every_whole_number_fits_64_bits() -> None:
    """Recipes cross process borders as JSON, which msgspec writes up to 64 bits."""
    for field in fields().values():
        assert field.kind != "int" or (field.minimum is not None and field.maximum is not None), field.path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("lora.rank", "a whole number from 1 to 1,024"),
        ("lora.dropout", "a number from 0 to below 1"),
        ("lora.alpha", "a number above 0 and at most 8,192"),
        ("data.max_length", "a whole number from 16 to 1,048,576"),
        ("training.seed", "a whole number from 0 to 4,294,967,295"),
        ("quantization.method", "one of nf4, fp4, int8, none"),
        ("data.packing", "true or false"),
        ("name", "a string in quotes of at most 80 characters"),
        ("note", "a string in quotes"),
        ("lora.target_modules", "a non-empty list of strings"),
        ("training.sample_prompts", "a list of strings"),
        ("data.sources", "a list of tables"),
    ],
)
def test_what_is_expected_in_words(path: str, words: str) -> None:
    assert fields()[path].expected == words


@given(st.data())
def test_a_setting_is_changed_and_read_back(data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(list(fields().values())))
    value = data.draw(values(field))
    changed = replace_setting(Recipe(), field.path, value)
    assert get_setting(changed, field.path) == value
    assert msgspec.convert(msgspec.to_builtins(changed), Recipe) == changed


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
@pytest.mark.slow
def test_equal_recipes_alone_have_no_difference(a: Recipe, b: Recipe) -> None:
    assert diff_recipes(a, a) == []
    assert (diff_recipes(a, b) == []) == (a == b)


def test_a_path_in_a_text_is_written_once_after_its_label() -> None:
    text = "training.epochs is 0. Raise training.epochs, or Rank (lora.rank), as in --set training.epochs=2."
    assert label_settings(text) == (
        "Epochs (training.epochs) is 0. Raise Epochs, or Rank (lora.rank), as in --set training.epochs=2."
    )
