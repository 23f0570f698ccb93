"""Keys of other trainers are read as the settings they mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.recipe import aliases, toml
from qlora_tui.recipe.fields import fields
from qlora_tui.recipe.layering import build_recipe, parse_override
from qlora_tui.recipe.validation import InvalidRecipeError

AXOLOTL = """
base_model = "HuggingFaceTB/SmolLM2-135M"
sequence_len = 2048
sample_packing = false
lora_r = 32
lora_alpha = 64
lora_dropout = 0.05
lora_target_modules = ["q_proj", "v_proj"]
gradient_accumulation_steps = 4
num_epochs = 3
eval_steps = 50
save_total_limit = 3
"""
HUGGING_FACE = """
[lora]
r = 8
lora_alpha = 16

[training]
per_device_train_batch_size = 2
gradient_accumulation_steps = 4
num_train_epochs = 1.5
lr_scheduler_type = "linear"
save_steps = 100
eval_steps = 20
logging_steps = 5
optim = "adamw_8bit"
"""


def load(folder: Path, text: str) -> tuple[dict[str, object], list[str]]:
    path = folder / "recipe.toml"
    path.write_text(text)
    notes: list[str] = []
    return toml.load(path, on_note=notes.append), notes


def test_axolotl_keys_above_the_sections_are_read(tmp_path: Path) -> None:
    layer, notes = load(tmp_path, AXOLOTL)
    recipe = toml.to_recipe(layer)
    assert (recipe.model.id, recipe.data.max_length, recipe.data.packing) == (
        "HuggingFaceTB/SmolLM2-135M",
        2048,
        False,
    )
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (32, 64, 0.05)
    assert recipe.lora.target_modules == ("q_proj", "v_proj")
    assert (recipe.training.gradient_accumulation, recipe.training.epochs) == (4, 3)
    assert (recipe.training.eval_every, recipe.training.keep_checkpoints) == (50, 3)
    assert len(notes) == 11


def test_hugging_face_keys_in_sections_are_read(tmp_path: Path) -> None:
    layer, notes = load(tmp_path, HUGGING_FACE)
    recipe = toml.to_recipe(layer)
    training = recipe.training
    assert (recipe.lora.rank, recipe.lora.alpha) == (8, 16)
    assert (training.micro_batch_size, training.gradient_accumulation, training.epochs) == (2, 4, 1.5)
    assert (training.lr_scheduler, training.optimizer) == ("linear", "adamw_8bit")
    assert (training.checkpoint_every, training.eval_every, training.log_every) == (100, 20, 5)
    assert f"{tmp_path}/recipe.toml: lr_scheduler_type is read as training.lr_scheduler." in notes


def test_every_alias_names_a_setting_and_is_none() -> None:
    for spelling, path in (aliases.ALIASES | aliases.RELATED).items():
        assert path in fields()
        assert spelling not in fields()


def test_an_alias_is_checked_as_the_setting_it_means(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipeError) as raised:
        load(tmp_path, '\nlora_r = "many"\n\n[training]\nper_device_train_batch_size = 0\n')
    first, second = raised.value.issues
    assert (first.line, first.path, first.message) == (
        2,
        "lora_r",
        'lora_r must be a whole number from 1 to 1,024, not "many"',
    )
    assert (second.line, second.path) == (5, "training.per_device_train_batch_size")


def test_two_spellings_of_one_setting_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipeError) as raised:
        load(tmp_path, "lora_r = 4\n\n[lora]\nrank = 8\n")
    (issue,) = raised.value.issues
    assert issue.message == "lora.rank and lora_r both set lora.rank"
    assert issue.line == 4


def test_a_key_with_other_values_here_is_only_hinted_at(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipeError) as raised:
        load(tmp_path, "load_in_4bit = true\n")
    (issue,) = raised.value.issues
    assert issue.hint == "did you mean quantization.method?"


def test_set_takes_aliases_in_any_section() -> None:
    notes: list[str] = []
    recipe = build_recipe(
        sets=["lora_r=4", "training.save_steps=7", "training.warmup_ratio=0.1"], on_note=notes.append
    )
    assert (recipe.lora.rank, recipe.training.checkpoint_every, recipe.training.warmup_ratio) == (4, 7, 0.1)
    assert notes == [
        "--set: lora_r is read as lora.rank.",
        "--set: save_steps is read as training.checkpoint_every.",
    ]
    assert parse_override("lora_target_modules=q_proj,v_proj") == {
        "lora": {"target_modules": ["q_proj", "v_proj"]}
    }


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ('lora.init_weights = "loftq"', "Leave it out, or train with LoftQ in peft"),
        ('lora.init_weights = "eva"', "Leave it out, or name an adapter that peft initialized"),
        ('lora.init_weights = "xavier"', ""),
        ('training.optimizer = "muon"', 'Write "adamw"'),
    ],
)
def test_a_removed_setting_or_value_says_what_to_do_instead(tmp_path: Path, setting: str, fix: str) -> None:
    with pytest.raises(InvalidRecipeError) as caught:
        load(tmp_path, setting)
    [issue] = caught.value.issues
    assert issue.path == setting.partition(" ")[0] and issue.line == 1
    assert caught.value.fix.startswith(fix)
    with pytest.raises(InvalidRecipeError) as overridden:
        parse_override(setting)
    assert overridden.value.fix == caught.value.fix


def test_a_removed_setting_is_ignored_where_it_changes_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, '[lora]\nrank = 8\ninit_weights = "random"') == ({"lora": {"rank": 8}}, [])
    assert parse_override("lora.init_weights=random") == {}
