"""The model card of an upload."""

from __future__ import annotations

import pytest

from qlora_tui.export.model_card import CardForm, render_model_card, run_rows
from qlora_tui.recipe.schema import Model, Recipe
from qlora_tui.runs.directory import create_run

RECIPE = Recipe(name="Tickets", model=Model(id="org/base"))


@pytest.mark.parametrize(
    ("form", "relation", "library"),
    [
        ("adapter", "adapter", "peft"),
        ("merged", "finetune", "transformers"),
        ("gguf", "quantized", "gguf"),
    ],
)
def test_the_relation_to_the_base_follows_the_form(form: CardForm, relation: str, library: str) -> None:
    card = render_model_card(RECIPE, from_hub=True, form=form)
    assert f"\nbase_model_relation: {relation}\n" in card
    assert f"\nlibrary_name: {library}\n" in card
    assert "- qlora-tui" in card


def test_a_base_from_a_folder_is_named_without_its_path() -> None:
    card = render_model_card(Recipe(model=Model(id="/home/me/models/base")), from_hub=False)
    assert "/home" not in card
    assert "base_model" not in card


def test_a_run_without_events_has_no_rows() -> None:
    assert run_rows(create_run(RECIPE)) == ()


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("adapter", 'AutoPeftModelForCausalLM.from_pretrained("me/tickets")'),
        ("merged", 'AutoModelForCausalLM.from_pretrained("me/tickets")'),
        ("gguf", "llama-server -hf me/tickets"),
    ],
)
def test_the_card_of_a_repository_says_how_to_load_it(form: CardForm, line: str) -> None:
    assert line in render_model_card(RECIPE, from_hub=True, form=form, repo="me/tickets")
    assert "## Use" not in render_model_card(RECIPE, from_hub=True, form=form)
