"""Line numbers of keys in a TOML text."""

from __future__ import annotations

from hypothesis import given

from qlora_tui.recipe import toml
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml_lines import key_lines, line_of
from tests.recipe.strategies import recipes

TEXT = '''\
name = "a = 1 # no comment"  # [lora]
note = """
[lora]
rank = 3
"""
[lora]
target_modules = [
    "q_proj", # rank = 4
    "k_proj",
]
rank = 5
  [data]
sources = [ { path = "x" },
  { path = "y" } ]
training.epochs = 1
[[a.b]]
c = 1
[[ a . b ]]
c = 2
[a.b.d]
e = """x\\""" = 1
f = 2"""
'g' = \'\'\'
h = 1\'\'\'
i = 1
'''


def test_keys_are_found_and_strings_and_comments_are_not() -> None:
    lines = key_lines(TEXT)
    assert {key: line for key, line in lines.items() if key[0] in ("name", "note", "lora")} == {
        ("name",): 1,
        ("note",): 2,
        ("lora",): 6,
        ("lora", "target_modules"): 7,
        ("lora", "rank"): 11,
    }


def test_dotted_keys_and_arrays_of_tables() -> None:
    lines = key_lines(TEXT)
    assert lines["data", "training", "epochs"] == 15
    assert lines["a", "b", 0, "c"] == 17
    assert lines["a", "b", 1, "c"] == 19
    assert lines["a", "b", 1, "d", "e"] == 21
    assert lines["a", "b", 1, "d", "i"] == 25


def test_a_key_in_an_inline_table_has_the_tables_line() -> None:
    assert line_of(key_lines(TEXT), ("data", "sources", 1, "path")) == 13
    assert line_of({}, ("data", "sources")) is None


@given(recipes())
def test_every_key_of_a_dumped_recipe_has_its_line(recipe: Recipe) -> None:
    text = toml.dump(recipe)
    lines = text.split("\n")
    line_of = key_lines(text)
    for section, table in toml.to_layer(recipe).items():
        for key in table if isinstance(table, dict) else ():
            heads = (f"{key} = ", f"[[{section}.{key}]]", f"[{section}.{key}]")
            assert lines[line_of[section, key] - 1].startswith(heads)
