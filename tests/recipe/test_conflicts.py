"""Settings that are right alone and wrong together, and recipes that are not ready."""

from __future__ import annotations

import pytest

from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.recipe.conflicts import check_conflicts, find_conflicts, require_runnable
from qlora_tui.recipe.fields import fields
from qlora_tui.recipe.schema import Data, Lora, Model, Quantization, Recipe, Source
from qlora_tui.recipe.training_settings import Training

STREAMED = Quantization(streamed_layers=4)
READY = Recipe(model=Model(id="m"), data=Data(sources=(Source(path="a"),)))


def test_the_defaults_do_not_conflict() -> None:
    assert find_conflicts(Recipe()) == []


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(training=Training(early_stopping=1), data=Data(validation_fraction=0.0)),
        Recipe(model=Model(attention="flash"), quantization=Quantization(compute_dtype="float32")),
        Recipe(quantization=STREAMED, training=Training(gradient_checkpointing="off")),
        Recipe(quantization=STREAMED, lora=Lora(use_dora=True)),
        Recipe(lora=Lora(train_embeddings=True, trainable_tokens=("<x>",))),
        Recipe(data=Data(preferences="dpo"), lora=Lora(train_embeddings=True)),
        Recipe(data=Data(preferences="orpo", train_on="everything")),
        Recipe(data=Data(preferences="simpo", overflow="split")),
        Recipe(data=Data(preferences="kto"), training=Training(replay_share=0.1)),
        Recipe(data=Data(preferences="dpo"), training=Training(neftune_alpha=5.0)),
        Recipe(training=Training(lr_scheduler="wsd", warmup_ratio=0.5, lr_decay_share=0.6)),
    ],
)
def test_a_conflict_names_its_settings(recipe: Recipe) -> None:
    [conflict] = find_conflicts(recipe)
    assert set(conflict.paths) <= set(fields())
    with pytest.raises(UserError) as caught:
        check_conflicts(recipe)
    assert all(path in str(caught.value) for path in conflict.paths)
    assert caught.value.exit_code == EXIT_USAGE


def test_a_validation_file_is_enough_to_stop_early() -> None:
    data = Data(validation_fraction=0.0, validation_path="v.jsonl")
    check_conflicts(Recipe(training=Training(early_stopping=1), data=data))


def test_a_run_needs_a_model_and_data() -> None:
    require_runnable(READY)
    with pytest.raises(UserError) as caught:
        require_runnable(Recipe())
    assert str(caught.value) == (
        "Not ready to run: The recipe has no model and no data: model.id and data.sources are empty.\n"
        "  Name a model: --model, or id under [model].\n"
        "  Name a data file: --data, or sources under [data]."
    )
    with pytest.raises(UserError, match=r"has no data: data\.sources is empty"):
        require_runnable(Recipe(model=Model(id="m")))
