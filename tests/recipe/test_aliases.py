"""Keys of other trainers, and removed settings, are refused with what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.recipe import aliases, toml
from qlora_tui.recipe.fields import fields
from qlora_tui.recipe.layering import build_recipe, parse_override
from qlora_tui.recipe.validation import InvalidRecipeError


def load(folder: Path, text: str) -> dict[str, object]:
    path = folder / "recipe.toml"
    path.write_text(text)
    return toml.load(path)


def test_every_alias_names_a_setting_and_is_none() -> None:
    for spelling, path in (aliases.ALIASES | aliases.RELATED).items():
        assert path in fields()
        assert spelling not in fields()


@pytest.mark.parametrize(
    ("text", "place", "setting"),
    [
        ("lora_r = 4", "lora_r", "lora.rank"),
        ("load_in_4bit = true", "load_in_4bit", "quantization.method"),
        ("[lora]\nr = 4", "lora.r", "lora.rank"),
        ("[training]\nsave_steps = 7", "training.save_steps", "training.checkpoint_every"),
    ],
)
def test_a_key_of_another_trainer_is_refused_with_ours(
    tmp_path: Path, text: str, place: str, setting: str
) -> None:
    with pytest.raises(InvalidRecipeError) as raised:
        load(tmp_path, text)
    with pytest.raises(InvalidRecipeError) as overridden:
        build_recipe(sets=[f"{place}=4"])
    for (issue,) in (raised.value.issues, overridden.value.issues):
        assert (issue.path, issue.hint) == (place, f"did you mean {setting}?")


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ('lora.init_weights = "loftq"', "Leave it out, or train with LoftQ in peft"),
        (
            'lora.init_weights = "eva"',
            "Leave it out, or set lora.init_from to an adapter that peft initialized",
        ),
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
    assert load(tmp_path, '[lora]\nrank = 8\ninit_weights = "random"') == {"lora": {"rank": 8}}
    assert parse_override("lora.init_weights=random") == {}
