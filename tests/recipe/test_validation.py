"""Every kind of mistake in a recipe file, word for word.

Line numbers of keys in a TOML text.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given

from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.recipe import toml
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.validation import InvalidRecipeError, key_lines, line_of
from tests.recipe.strategies import recipes


def refused(text: str) -> InvalidRecipeError:
    with pytest.raises(InvalidRecipeError) as caught:
        toml.validate(toml.parse(text, "r.toml"), "r.toml", text)
    assert caught.value.exit_code == EXIT_USAGE
    return caught.value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[lora]\nrnak = 16", "line 2: lora.rnak is not a setting\n  Did you mean lora.rank?"),
        ("rank = 16", "line 1: rank is not a setting\n  Put rank in [lora]"),
        ("[training]\nrank = 1", "line 2: training.rank is not a setting\n  Put rank in [lora]"),
        (
            "[lora]\nname = 'x'",
            "line 2: lora.name is not a setting\n  Put name at the top, above the sections",
        ),
        (
            '[quantization]\nprecision = "fp16"',
            "line 2: quantization.precision is not a setting\n  Did you mean quantization.method?",
        ),
        ("[trainig]\nepochs = 1", "line 1: [trainig] is not a section\n  Did you mean [training]?"),
        ("lora = 3", "line 1: lora must be a section, not 3\n  Write [lora]"),
        ("[lora]\nrank = 5000", "line 2: lora.rank must be a whole number from 1 to 1,024, not 5,000"),
        ("[lora]\nrank = 0", "line 2: lora.rank must be a whole number from 1 to 1,024, not 0"),
        (
            "[lora]\nrank = 16.0",
            "line 2: lora.rank must be a whole number from 1 to 1,024, not 16\n  Write 16",
        ),
        (
            '[lora]\nrank = "16"',
            'line 2: lora.rank must be a whole number from 1 to 1,024, not "16"\n  Write 16, without quotes',
        ),
        (
            f"[lora]\nrank = 1{'0' * 40}",
            "line 2: lora.rank must be a whole number from 1 to 1,024, not a number too large to read",
        ),
        ("[lora]\ndropout = 1", "line 2: lora.dropout must be a number from 0 to below 1, not 1"),
        ("[lora]\nalpha = nan", "line 2: lora.alpha must be a number above 0 and at most 8,192, not nan"),
        ("[lora]\nalpha = inf", "line 2: lora.alpha must be a number above 0 and at most 8,192, not inf"),
        (
            "[training]\nepochs = 2030-01-01",
            "line 2: training.epochs must be a number above 0 and at most 1,000, not a date or time",
        ),
        (
            f"name = '{'n' * 81}'",
            f'line 1: name must be a string in quotes of at most 80 characters, not "{"n" * 39}…"',
        ),
        (
            "[quantization]\nmethod = 'nf5'",
            'line 2: quantization.method must be one of nf4, fp4, int8, none, not "nf5"\n'
            '  Did you mean "nf4"?',
        ),
        (
            "[lora]\ntarget_modules = []",
            "line 2: lora.target_modules must be a non-empty list of strings, not an empty list",
        ),
        (
            "[lora]\ntarget_modules = ['8-3.q_proj']",
            'line 2: lora.target_modules: layers "8-3" run backwards\n  Write 3-8',
        ),
        (
            "[data]\nsources = 'a'",
            'line 2: data.sources must be a list of tables, not "a"\n  Write [{ path = "a" }]',
        ),
        (
            "[[data.sources]]\nformat = 'text'",
            "line 1: data.sources[1] has no path\n  Add path = …, a non-empty string in quotes",
        ),
        (
            "[data]\nmax_length = 10\nsources = [\n  { path = 'a', weight = 0 },\n]",
            "2 mistakes\n"
            "  r.toml, line 2: data.max_length must be a whole number from 16 to 1,048,576, not 10\n"
            "  r.toml, line 3: data.sources[1].weight must be a number above 0 and at most 1,000, not 0",
        ),
    ],
)
def test_a_mistake_says_where_what_and_what_was_meant(text: str, message: str) -> None:
    prefix = "Invalid recipe: " + ("" if "mistakes\n" in message else "r.toml, ")
    assert str(refused(text)) == prefix + message


def test_all_errors_of_a_file_are_reported_in_order() -> None:
    text = "zzz = 1\n[training]\nlr = 3\n[lora]\nrnak = 16\nrank = 'a'\n"
    assert [mistake.line for mistake in refused(text).issues] == [1, 3, 5, 6]
    assert [mistake.path for mistake in refused(text).issues] == [
        "zzz",
        "training.lr",
        "lora.rnak",
        "lora.rank",
    ]


def test_a_file_full_of_mistakes_is_not_printed_whole() -> None:
    problem = refused("\n".join(f"zzz{n} = 1" for n in range(500)))
    assert len(problem.issues) == 500
    assert str(problem).endswith("\n  and 480 more")


def test_loading_a_file_names_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[lora]\nrank = 0\n")
    with pytest.raises(InvalidRecipeError, match=r"mine\.toml, line 2: "):
        toml.load(path)


def test_an_invalid_recipe_crosses_a_process_border() -> None:
    problem = refused("[lora]\nrank = 0")
    copy = pickle.loads(pickle.dumps(problem))
    assert isinstance(copy, UserError) and str(copy) == str(problem)


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
@pytest.mark.slow
def test_every_key_of_a_dumped_recipe_has_its_line(recipe: Recipe) -> None:
    text = toml.dump(recipe)
    lines = text.split("\n")
    line_of = key_lines(text)
    for section, table in toml.to_layer(recipe).items():
        for key in table if isinstance(table, dict) else ():
            heads = (f"{key} = ", f"[[{section}.{key}]]", f"[{section}.{key}]")
            assert lines[line_of[section, key] - 1].startswith(heads)
