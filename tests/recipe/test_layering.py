"""Layers over layers: preset, file, arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui import paths
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.recipe import layering
from qlora_tui.recipe.fields import Field, fields
from qlora_tui.recipe.layering import with_absolute_paths
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.recipe.validation import InvalidRecipeError
from tests.recipe.strategies import values


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_later_layer_wins_key_by_key(tmp_path: Path) -> None:
    write(paths.user_presets_dir() / "mine.toml", "[lora]\nrank = 2\nalpha = 3\ndropout = 0.5\n")
    file = write(tmp_path / "r.toml", "[lora]\nalpha = 4\ndropout = 0.25\n")
    lora = layering.build_recipe(preset="mine", file=file, sets=["lora.dropout=0.125"]).lora
    assert (lora.rank, lora.alpha, lora.dropout) == (2, 4.0, 0.125)


def test_lists_are_replaced_whole(tmp_path: Path) -> None:
    file = write(tmp_path / "r.toml", "[lora]\ntarget_modules = ['q_proj', 'k_proj']\n")
    recipe = layering.build_recipe(file=file, sets=["lora.target_modules=v_proj"])
    assert recipe.lora.target_modules == ("v_proj",)


def test_a_presets_own_name_and_note_stay_with_it() -> None:
    write(paths.user_presets_dir() / "mine.toml", "name = 'n'\nnote = 'about the preset'\n[lora]\nrank = 2\n")
    recipe = layering.build_recipe(preset="mine")
    assert (recipe.name, recipe.note, recipe.lora.rank) == ("", "", 2)


def test_model_and_data_arguments_win_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "r.toml", "[model]\nid = 'a'\n[[data.sources]]\npath = 'a.jsonl'\nweight = 2\n")
    recipe = layering.build_recipe(file=file, model="b", data=["c.jsonl", "d.jsonl"])
    assert recipe.model.id == "b"
    assert recipe.data.sources == (Source(path="c.jsonl"), Source(path="d.jsonl"))


def test_another_model_does_not_take_over_the_files_revision(tmp_path: Path) -> None:
    file = write(tmp_path / "r.toml", "[model]\nid = 'a'\nrevision = 'abc'\n")
    assert layering.build_recipe(file=file, model="b").model.revision == "main"
    assert layering.build_recipe(file=file, model="a").model.revision == "abc"
    assert layering.build_recipe(file=file, model="b", sets=["model.revision=v2"]).model.revision == "v2"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lora.rank=32", 32),
        (" lora.rank = 32 ", 32),
        ("lora.alpha=64", 64.0),
        ("training.learning_rate=1e-4", 1e-4),
        ("data.packing=false", False),
        ("training.lr_scheduler=linear", "linear"),
        ("training.lr_scheduler='linear'", "linear"),
        ("model.id=Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("model.id=/models/a=b", "/models/a=b"),
        ('model.id="a b"', "a b"),
        ("name=3", "3"),
        ("name=", ""),
        ("note=it's fine", "it's fine"),
        ("lora.target_modules=q_proj", ("q_proj",)),
        ("lora.target_modules=q_proj, v_proj", ("q_proj", "v_proj")),
        ("lora.target_modules=0-3,7.q_proj,k_proj", ("0-3,7.q_proj", "k_proj")),
        ('lora.target_modules=["q_proj"]', ("q_proj",)),
        ("training.sample_prompts=Hello, who are you?", ("Hello, who are you?",)),
        ('training.sample_prompts=["a", "b"]', ("a", "b")),
        ("training.sample_prompts=[]", ()),
        ("data.sources=a,b.jsonl", (Source(path="a,b.jsonl"),)),
        ('data.sources=[{path="a", weight=2}]', (Source(path="a", weight=2.0),)),
    ],
)
def test_a_set_value_needs_no_quotes(argument: str, value: Any) -> None:
    path = argument.partition("=")[0].strip()
    here: Any = layering.build_recipe(sets=[argument])
    for part in path.split("."):
        here = getattr(here, part)
    assert here == value


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lora.rank=x", 'lora.rank must be a whole number from 1 to 1,024, not "x"'),
        ("lora.rank=", 'lora.rank must be a whole number from 1 to 1,024, not ""'),
        ("lora.rank", "it has no value\n  Write --set lora.rank=value"),
        ("", "it has no value\n  Write --set section.key=value"),
        ("=3", "it names no setting\n  The sections are [model], [quantization], [lora], [data], [training]"),
        ("rank=3", "rank is not a setting\n  Did you mean lora.rank?"),
        ("lora.rnak=3", "lora.rnak is not a setting\n  Did you mean lora.rank?"),
        ("lor.rank=3", "lor.rank is not a setting\n  Did you mean lora.rank?"),
        ("training.rank=3", "training.rank is not a setting\n  Did you mean lora.rank?"),
        ("load_in_4bit=3", "load_in_4bit is not a setting\n  Did you mean quantization.method?"),
        (
            "quantization=nf4",
            "quantization is a section, not a setting\n  Name one of quantization.method, "
            "quantization.double_quantization, quantization.experts, quantization.skip, "
            "quantization.compute_dtype, "
            "quantization.streamed_layers",
        ),
        ("data.packing=True", 'data.packing must be true or false, not "True"\n  Write true'),
        (
            "quantization.method=nf5",
            'quantization.method must be one of nf4, fp4, int8, none, not "nf5"\n  Did you mean "nf4"?',
        ),
        (
            "lora.target_modules=",
            'lora.target_modules: "" is not a target pattern\n  Write all-linear, a module name '
            "(q_proj), layers and a name (8-23.q_proj), or a full module path",
        ),
        ("data.sources=", 'data.sources[1].path must be a non-empty string in quotes, not ""'),
    ],
)
def test_a_wrong_set_names_itself(argument: str, message: str) -> None:
    with pytest.raises(InvalidRecipeError) as caught:
        layering.parse_override(argument)
    assert str(caught.value) == f"Invalid recipe: --set {argument}: {message}"
    assert caught.value.exit_code == EXIT_USAGE


def test_a_set_cannot_smuggle_in_a_second_setting() -> None:
    with pytest.raises(InvalidRecipeError, match=r"--set lora\.rank=8\?x=3: "):
        layering.parse_override("lora.rank=8\nx=3")


def test_bytes_that_are_no_text_are_refused() -> None:
    for call in ({"sets": ["name=\udcff"]}, {"model": "m\udcff"}, {"data": ["d\udcff"]}):
        with pytest.raises(InvalidRecipeError, match="is not UTF-8"):
            layering.build_recipe(**call)


def test_all_wrong_sets_come_at_once() -> None:
    with pytest.raises(InvalidRecipeError) as caught:
        layering.build_recipe(sets=["lora.rank=0", "lora.alpha=1", "zzz=1"])
    assert [mistake.origin for mistake in caught.value.issues] == ["--set lora.rank=0", "--set zzz=1"]


def test_each_layer_is_blamed_for_its_own_mistakes(tmp_path: Path) -> None:
    preset = write(paths.user_presets_dir() / "mine.toml", "[lora]\nrank = 0\n")
    with pytest.raises(InvalidRecipeError, match=f"{preset}, line 2: lora.rank"):
        layering.build_recipe(preset="mine", sets=["lora.rank=8"])
    file = write(tmp_path / "r.toml", "\n[lora]\nrank = 0\n")
    with pytest.raises(InvalidRecipeError, match=r"r\.toml, line 3: lora\.rank"):
        layering.build_recipe(file=file, sets=["lora.rank=8"])


def test_settings_of_different_layers_that_conflict_are_refused() -> None:
    with pytest.raises(UserError, match=r"there is no validation data") as caught:
        layering.build_recipe(preset="style", sets=["data.validation_fraction=0"])
    assert caught.value.exit_code == EXIT_USAGE


@given(st.data())
def test_any_value_can_be_set(data: st.DataObject) -> None:
    field: Field = data.draw(st.sampled_from([f for f in fields().values() if f.kind != "tables"]))
    value = data.draw(values(field))
    literal = tomli_w.dumps({"v": value}).removeprefix("v = ").strip()
    if field.kind == "numbers":
        literal = "{" + ", ".join(f'"{pattern}" = {number!r}' for pattern, number in value.items()) + "}"
    layer = layering.parse_override(f"{field.path}={literal}")
    parsed = layer[field.section][field.key] if field.section else layer[field.key]
    assert (tuple(parsed) if isinstance(parsed, list) else parsed) == value


@given(st.text() | st.tuples(st.sampled_from(sorted(fields())), st.text()).map("=".join))
def test_every_setting_gives_a_layer_or_an_error(argument: str) -> None:
    try:
        layering.build_recipe(sets=[argument])
    except UserError as problem:
        assert problem.exit_code == EXIT_USAGE


def test_ranks_by_pattern_are_written_without_brackets() -> None:
    lora = layering.build_recipe(
        sets=["lora.rank_pattern=0-3,7.q_proj=32, down_proj=8", "lora.alpha_pattern=q_proj=64"]
    ).lora
    assert lora.rank_pattern == {"0-3,7.q_proj": 32, "down_proj": 8}
    assert lora.alpha_pattern == {"q_proj": 64.0}
    assert layering.build_recipe(sets=["lora.rank_pattern="]).lora.rank_pattern == {}
    assert layering.build_recipe(sets=["lora.rank_pattern={q_proj = 4}"]).lora.rank_pattern == {"q_proj": 4}


@pytest.mark.parametrize("wrong", ["q_proj", "q_proj=0", "q proj=4", "q_proj=many"])
def test_a_wrong_rank_by_pattern_is_named(wrong: str) -> None:
    with pytest.raises(InvalidRecipeError, match="rank_pattern"):
        layering.build_recipe(sets=[f"lora.rank_pattern={wrong}"])


def test_local_files_become_absolute_and_hub_ids_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(
        model=Model(id="./model"),
        data=Data(sources=(Source(path="rows.jsonl"), Source(path="org/dataset"))),
    )
    moved = with_absolute_paths(recipe)
    assert moved.model.id == str(tmp_path / "model")
    assert [s.path for s in moved.data.sources] == [str(tmp_path / "rows.jsonl"), "org/dataset"]
    assert moved.data.validation_path == ""
