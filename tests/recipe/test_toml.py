"""Recipes as TOML: round trips, files that cannot be read, texts that are not TOML."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given

from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.recipe import layering, toml
from qlora_tui.recipe.schema import Lora, Recipe
from tests.recipe.strategies import recipes


def refusal(text: str, tmp_path: Path, name: str = "mine.toml") -> str:
    (tmp_path / name).write_text(text)
    return refusal_of(tmp_path / name)


def refusal_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        toml.load(path)
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value).replace(f"{path.parent}/", "")


def test_a_pipe_is_no_recipe_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    assert "it is a pipe or a device" in refusal_of(tmp_path / "pipe.toml")


@given(recipes())
@pytest.mark.slow
def test_a_dumped_recipe_reads_back_equal(recipe: Recipe) -> None:
    for text in (toml.dump(recipe), toml.dump(recipe, comments=True)):
        layer = toml.parse(text, "it")
        toml.validate(layer, "it", text)
        assert toml.to_recipe(layer) == recipe


@given(recipes(), recipes())
@pytest.mark.slow
def test_a_difference_over_its_base_is_the_recipe(recipe: Recipe, base: Recipe) -> None:
    layer = toml.parse(toml.dump_overrides(recipe, base), "it")
    assert toml.to_recipe(layering.merge_layers(toml.to_layer(base), layer)) == recipe


def test_equal_recipes_have_an_empty_difference() -> None:
    assert toml.dump_overrides(Recipe(), Recipe()) == ""


def test_a_difference_holds_nothing_but_what_differs() -> None:
    assert toml.dump_overrides(Recipe(lora=Lora(rank=8)), Recipe()) == "[lora]\nrank = 8\n"


def test_a_whole_number_serves_where_a_number_is_asked() -> None:
    recipe = toml.to_recipe(toml.parse("[lora]\nalpha = 64", "it"))
    assert recipe.lora.alpha == 64.0 and isinstance(recipe.lora.alpha, float)


def test_a_byte_order_mark_and_crlf_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbf[lora]\r\nrank = 8\r\n")
    assert toml.load(tmp_path / "mine.toml") == {"lora": {"rank": 8}}


def test_a_text_that_is_not_toml_names_file_and_line(tmp_path: Path) -> None:
    assert refusal("[lora]\nrank 16\n", tmp_path) == (
        "Not TOML: mine.toml, line 2: Expected '=' after a key in a key/value pair. It reads: rank 16\n"
        "  Write key = value under a [section]; strings in quotes, true and false in lower case."
    )


def test_an_unfinished_text_names_its_last_line(tmp_path: Path) -> None:
    assert "mine.toml, line 2: " in refusal('[data]\nsources = ["a",\n', tmp_path)


@pytest.mark.parametrize("text", ["a = " + "[" * 20_000, "a = " + "9" * 5_000])
def test_a_hostile_text_is_refused_like_any_other(text: str, tmp_path: Path) -> None:
    assert refusal(text, tmp_path).startswith("Not TOML: mine.toml")


def test_a_file_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b'name = "x"\nnote = "caf\xe9"\n')
    assert refusal_of(tmp_path / "mine.toml") == (
        "Cannot read recipe: mine.toml: line 2 is not UTF-8 text.\n  Save it as UTF-8 in your editor."
    )


def test_a_missing_file_names_a_similar_one(tmp_path: Path) -> None:
    (tmp_path / "style.toml").touch()
    assert refusal_of(tmp_path / "stile.toml") == (
        "Cannot read recipe: stile.toml: there is no such file.\n  Did you mean style.toml?"
    )


def test_a_file_the_system_refuses(tmp_path: Path) -> None:
    loop = tmp_path / "mine.toml"
    loop.symlink_to(loop)
    assert "mine.toml: Too many levels of symbolic links." in refusal_of(loop)


def test_a_path_no_file_can_have() -> None:
    assert "Cannot read recipe" in refusal_of(Path("a\0b"))


def test_a_model_given_as_a_recipe_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(10**10)
    assert "over 1 MB" in refusal_of(tmp_path / "model.safetensors")
