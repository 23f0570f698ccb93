"""Every check both ways: it fires on what it is for, and is silent on what is fine.

Plain text longer than a row: what is lost is said, with the rows that splitting makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.inspection import inspect
from qlora_tui.data.problems import CHECKS, MAX_LISTED_ROWS, ProblemCounter, row_outcome
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.schema import Data, Recipe, Source
from tests.data.families import CHATML, MARKED, STRIPS, family, tokenizer_for, tokenizer_json

WITHOUT_END = MARKED.replace(
    "{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}",
    "{{- m.content -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
)
CALL = {"function": {"name": "f", "arguments": {}}}
FINE: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Grüße, it’s 20 °C — naïve?"},
            {"role": "assistant", "content": "Yes: sk-ip it. AKIA is a prefix, Âge is a word."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Two?"},
            {"role": "assistant", "content": "Yes, two.\n\tReally."},
            {"role": "user", "content": "Three?"},
            {"role": "assistant", "content": "No."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "It rains."},
        ]
    },
]


def count_kinds(
    tmp_path: Path, rows: list[Any], tokenizer: ChatTokenizer | None = None, data: Data | None = None
) -> dict[str, tuple[int, ...]]:
    """Rows by kind of problem."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = inspect(Source(path=str(path)), tokenizer or family("chatml"), data)
    for problem in report.problems:
        assert problem.example
        assert problem.fix
        assert problem.count == len(problem.rows)
    return {problem.kind: problem.rows for problem in report.problems}


def pair(question: Any, answered: Any, **more: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answered, **more},
        ]
    }


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]}


LONG = (
    "The quick brown fox jumps over the lazy dog while nine wizards box five jugs of {} ale at noon, "
    "and then they all walk home along the river, where the water is cold and the old boats lie upside "
    "down in the grass until the spring comes back."
)
BAD: dict[str, list[Any]] = {
    "unknown-role": [turns("wizard", "assistant")],
    "unsupported-part": [pair("a", [{"type": "file", "file": {"file_id": "x"}}])],
    "media": [
        pair([{"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}], "a"),
        {**pair("a", "b"), "images": ["fox.jpg"]},
        pair("<image>What is this?", "A fox."),
    ],
    "ends-with-user": [turns("user", "assistant", "user"), turns("user"), turns("system", "user")],
    "wrong-format": [{"message": "x"}],
    "bad-row": [[1, 2]],
    "empty-row": [{"messages": []}, pair("a", " ")],
    "empty-answer": [{"messages": [*pair("a", "")["messages"], *pair("b", "c")["messages"]]}],
    "no-answer": [turns("user"), pair("a", "b", train=False)],
    "role-order": [
        turns("user", "user", "assistant"),
        turns("user", "system", "assistant"),
        turns("tool", "assistant"),
    ],
    "control-tokens": [pair("stop <|im_end|> now", "b"), pair("a", "end </s>")],
    "duplicate": [pair("Two?", "Again."), pair("two?  ", "AGAIN.")],
    "near-duplicate": [pair("Tell.", LONG.format("pale")), pair("Tell.", LONG.format("brown"))],
    "encoding-damage": [
        pair("GrÃ¼Ã\u009fe", "x"),
        pair("itâ€™s", "y"),
        pair("caf\ufffd", "z"),
        pair("a\x07", "bell"),
    ],
    "secret": [
        pair("key?", "AKIA" + "ABCDEFGHIJKLMNOP"),
        pair("token?", "hf_" + "a1B2" * 9),
        pair("pem?", "-----BEGIN RSA " + "PRIVATE KEY-----"),
        pair("gh?", "ghp_" + "x1Y2" * 9),
    ],
}


@pytest.mark.parametrize("kind", BAD)
def test_a_check_fires_on_each_bad_row(tmp_path: Path, kind: str) -> None:
    rows = [*FINE, *BAD[kind]]
    expected = tuple(range(len(FINE) + 1, len(rows) + 1))
    if kind in ("duplicate", "near-duplicate"):
        expected = expected[1:]
    assert count_kinds(tmp_path, rows)[kind] == expected


@pytest.mark.parametrize("name", ["chatml", "strips", "drops-thinking", "tools", "ends-with-eos"])
def test_fine_rows_raise_nothing(tmp_path: Path, name: str) -> None:
    assert count_kinds(tmp_path, FINE, family(name)) == {}


def test_rows_that_share_a_phrase_are_not_near_duplicates(tmp_path: Path) -> None:
    endings = [" ".join(f"w{n}x{k}" for k in range(30)) for n in range(20)]
    rows = [pair(f"Question {n}?", f"The answer to this question is {end}") for n, end in enumerate(endings)]
    assert count_kinds(tmp_path, rows) == {}


def test_a_template_that_refuses_is_reported_with_its_words(tmp_path: Path) -> None:
    assert count_kinds(tmp_path, [pair("a", "b"), turns("user", "user")], family("no-system"))[
        "no-answer"
    ] == (2,)
    refused = count_kinds(tmp_path, [pair("a", "b"), turns("user", "user", "assistant")], family("no-system"))
    assert refused == {"template-refuses": (2,), "role-order": (2,)}


def test_a_row_in_which_everything_trains_is_reported(tmp_path: Path) -> None:
    bare = "{%- for m in messages -%}{{- m.content + eos_token -}}{%- endfor -%}"
    rows = [pair("a", "b"), turns("assistant")]
    assert count_kinds(tmp_path, rows, tokenizer_for(bare))["everything-trained"] == (2,)


def test_an_end_of_turn_that_is_not_learned_blocks(tmp_path: Path) -> None:
    assert count_kinds(tmp_path, FINE[:2], tokenizer_for(MARKED)) == {}
    assert count_kinds(tmp_path, FINE[:2], tokenizer_for(WITHOUT_END)) == {"turn-end-untrained": (1, 2)}
    assert CHECKS["turn-end-untrained"].severity == "error"


def test_a_pad_token_that_hides_the_end_is_named(tmp_path: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    assert count_kinds(tmp_path, FINE[:2], ChatTokenizer(tokenizer_json(), names, WITHOUT_END)) == {
        "pad-hides-end": (1, 2)
    }
    assert count_kinds(tmp_path, FINE[:2], ChatTokenizer(tokenizer_json(), names, CHATML)) == {}


def test_two_begin_tokens_are_reported(tmp_path: Path) -> None:
    assert count_kinds(tmp_path, FINE[:2], tokenizer_for("{{- bos_token -}}" + STRIPS)) == {
        "double-bos": (1, 2)
    }
    assert count_kinds(tmp_path, FINE[:2], tokenizer_for(STRIPS)) == {}


def test_an_answer_the_template_changes_is_reported(tmp_path: Path) -> None:
    upper = CHATML.replace("m.content", "(m.content | replace('x', 'y'))")
    assert count_kinds(tmp_path, [pair("a", "fox"), pair("b", "dog")], tokenizer_for(upper)) == {
        "answer-changed": (1,)
    }


@pytest.mark.parametrize(
    ("too_long", "kinds"),
    [
        ("drop", {"too-long": (1, 2)}),
        ("cut-left", {"too-long": (1, 2)}),
        ("split", {"too-long": (1, 2)}),
        ("cut-right", {"too-long": (2,), "nothing-left": (1,)}),
    ],
)
def test_rows_beyond_the_length_limit_are_reported(
    tmp_path: Path, too_long: Any, kinds: dict[str, Any]
) -> None:
    rows = [pair("word " * 40, "short"), pair("a", "word " * 40), pair("a", "fits")]
    assert count_kinds(tmp_path, rows, data=Data(max_length=32, overflow=too_long)) == kinds


@pytest.mark.parametrize(("said", "reported"), [("<tool_call>{}</tool_call>", False), ("Let me see.", True)])
def test_a_tool_may_answer_a_call_in_the_text(tmp_path: Path, said: str, reported: bool) -> None:
    turns = [("human", "q"), ("gpt", said), ("tool", "r"), ("gpt", "a")]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"conversations": [{"from": r, "value": v} for r, v in turns]}))
    kinds = [problem.kind for problem in inspect(Source(path=str(path))).problems]
    assert ("role-order" in kinds) is reported


def test_a_secret_is_not_shown_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    key = "hf_" + "a1B2" * 9
    path.write_text(json.dumps(pair("token?", key)))
    problem = inspect(Source(path=str(path))).problems[0]
    assert key not in problem.example
    assert problem.example == "hf_a1B… (39 characters)"


def test_a_tally_keeps_the_first_rows_and_counts_the_rest() -> None:
    tally = ProblemCounter()
    for row in range(1, MAX_LISTED_ROWS + 51):
        for example in ("row", "the same row"):
            tally.add("duplicate", row, f"{example}\n{row}")
    tally.add("bad-json", 3)
    first, second = tally.problems()
    assert first.kind == "bad-json"
    assert (second.count, len(second.rows), second.example) == (
        MAX_LISTED_ROWS + 50,
        MAX_LISTED_ROWS,
        "row 1",
    )


@pytest.mark.parametrize(
    ("kind", "data", "outcome"),
    [
        ("bad-json", Data(), ", run blocked"),
        ("bad-json", Data(bad_rows="skip"), ", left out"),
        ("turn-end-untrained", Data(bad_rows="skip"), ", run blocked"),
        ("too-long", Data(), ", cut right"),
        ("too-long", Data(overflow="drop"), ", left out"),
        ("long-text", Data(overflow="cut-left"), ", cut left"),
        ("no-answer", Data(), ", left out"),
        ("rated-bad", Data(), ""),
        ("duplicate", Data(), ", used"),
    ],
)
def test_a_problem_says_what_becomes_of_its_rows(kind: str, data: Data, outcome: str) -> None:
    counter = ProblemCounter(data=data)
    counter.add(kind, 1)
    assert row_outcome(counter.problems()[0], data) == outcome


def texts(path: Path, *lengths: int) -> Source:
    path.write_text("\n\n".join(" ".join(f"w{n % 7}" for n in range(length)) for length in lengths) + "\n")
    return Source(path=str(path))


@pytest.mark.parametrize("too_long", ["cut-right", "cut-left", "drop"])
def test_a_long_text_names_the_rows_that_splitting_makes(
    private_home: Path, tmp_path: Path, too_long: Any
) -> None:
    source = texts(tmp_path / "book.txt", 500, 20, 300)
    tokenizer = family("chatml")
    report = inspect(source, tokenizer, Data(max_length=64, overflow=too_long))
    (problem,) = (p for p in report.problems if p.kind == "long-text")
    assert (problem.count, problem.rows, problem.severity) == (2, (1, 5), "warning")
    assert f'data.overflow = "{too_long}"' in problem.example
    assert "data.overflow=split" in problem.fix
    assert not {"too-long", "nothing-left"} & {p.kind for p in report.problems}
    short = 1
    split = Data(sources=(source,), max_length=64, overflow="split", validation_fraction=0)
    assert problem.split_rows + short == len(prepare_dataset(Recipe(data=split), tokenizer).train)


def test_what_stays_of_a_text_is_counted_in_tokens(tmp_path: Path) -> None:
    source = texts(tmp_path / "book.txt", 500)
    tokenizer = family("chatml")
    whole = len(tokenizer.encode(Path(source.path).read_text().strip())) + 1
    problem = next(
        p for p in inspect(source, tokenizer, Data(max_length=64)).problems if p.kind == "long-text"
    )
    assert problem.example == (
        f'data.overflow = "cut-right" keeps the first 64 of {whole:,} tokens; splitting gives '
        f"{-(-whole // 64)} rows."
    )


def test_without_a_tokenizer_the_rows_of_a_split_are_estimated(tmp_path: Path) -> None:
    source = texts(tmp_path / "book.txt", 500)
    characters = len(Path(source.path).read_text().strip())
    rows = -(-characters // (4 * 64))
    problem = next(p for p in inspect(source, None, Data(max_length=64)).problems if p.kind == "long-text")
    assert f"One text holds {characters:,} characters" in problem.example
    assert f"about {rows} rows (estimated" in problem.example
    assert (problem.split_rows, problem.is_estimate) == (rows, True)
    assert "long-text" not in {p.kind for p in inspect(source, None, Data(max_length=1024)).problems}


@pytest.mark.parametrize("too_long", ["cut-right", "split"])
@pytest.mark.parametrize("model", ["", "chatml"])
def test_one_long_text_is_not_reported_as_only_one_row(tmp_path: Path, too_long: Any, model: str) -> None:
    tokenizer = family(model) if model else None
    for words, expected in ((500, False), (3, True)):
        source = texts(tmp_path / "book.txt", words)
        report = inspect(source, tokenizer, Data(max_length=64, overflow=too_long))
        assert ("one-row" in {p.kind for p in report.problems}) is expected


def test_a_long_conversation_is_no_long_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\nq," + "word " * 200 + "\n")
    kinds = {p.kind for p in inspect(Source(path=str(path)), family("chatml"), Data(max_length=64)).problems}
    assert "too-long" in kinds
    assert "long-text" not in kinds
