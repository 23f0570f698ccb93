"""The model card of an upload."""

from __future__ import annotations

import pytest

from qlora_tui.export.model_card import CardForm, CardResults, render_model_card, run_rows
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
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


def test_license_proof_and_effect_are_said() -> None:
    results = CardResults(effect="It changes 3 %.", proof="Q8_0 answers alike (KL 0.01).", license_id="mit")
    card = render_model_card(RECIPE, from_hub=True, results=results)
    assert "\nlicense: mit\n" in card
    assert card.endswith("\nIt changes 3 %.\n\nQ8_0 answers alike (KL 0.01).\n")


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


def test_a_converted_base_is_named_without_its_hash() -> None:
    recipe = Recipe(model=Model(id="/models/SmolLM2-135M-Instruct.Q4_1-fa7256748bd9"))
    assert "# SmolLM2-135M-Instruct, fine-tuned" in render_model_card(recipe, from_hub=False)


@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_the_card_says_which_base_weights_were_used(form: CardForm) -> None:
    def method(is_dequantized: bool) -> str:
        card = render_model_card(RECIPE, from_hub=True, form=form, is_dequantized=is_dequantized)
        return next(line for line in card.splitlines() if "| Method |" in line)

    assert method(True) == "| Method | LoRA on NF4 weights, merged into these weights, dequantized |"
    assert method(False) == "| Method | LoRA on NF4 weights, merged into the 16-bit base |"


def test_a_dataset_of_the_hub_is_linked() -> None:
    data = Data(sources=(Source(path="org/chats:en"), Source(path="/home/me/mine.jsonl")))
    card = render_model_card(Recipe(model=Model(id="org/base"), data=data), from_hub=True)
    assert "\ndatasets:\n- org/chats\ntags:" in card
    assert "| Data | org/chats:en, mine.jsonl |" in card
