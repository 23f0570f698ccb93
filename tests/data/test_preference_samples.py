"""What a preference method stores of rows: both sides of each pair, and rated answers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.data.conversation import RowRejectedError
from qlora_tui.data.dataset import PreparedDataset, _layout_key, prepare_dataset
from qlora_tui.data.formats import RowFormat, detect, parse
from qlora_tui.data.inspection import inspect, show
from qlora_tui.data.row import Row
from qlora_tui.data.store import BAD, GOOD, Samples, Store
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Preferences, Recipe, Source
from tests.data.families import family
from tests.data.test_preferences import ASKED, NAMES, RATINGS, SIDES

CHATML = family("chatml")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def prepared(folder: Path, rows: list[Any], method: Preferences, **settings: Any) -> PreparedDataset:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"validation_fraction": 0.0, "max_length": 256} | settings
    sources = (Source(path=str(file)),)
    return prepare_dataset(Recipe(data=Data(sources=sources, preferences=method, **data)), CHATML)


def answers(samples: Samples) -> list[tuple[int, str]]:
    """Side and trained text of each sample."""
    texts = []
    for i in range(len(samples)):
        ids = itertools.compress(samples.token_ids(i), samples.loss_mask(i))
        text = CHATML.decode([token for token in ids if token not in CHATML.special_ids])
        texts.append((samples.side(i), text.strip()))
    return texts


@pytest.mark.parametrize(("side", "question"), itertools.product(SIDES, ("prompt", "messages", "sharegpt")))
def test_each_spelling_gives_both_sides_of_the_pair(tmp_path: Path, side: str, question: str) -> None:
    better, worse = NAMES[len(question) % len(NAMES)]
    row = {**ASKED[question], better: SIDES[side][0], worse: SIDES[side][1]}
    train = prepared(tmp_path, [row], "dpo").train
    pair = [(GOOD, "This."), (BAD, "REJECTED")]
    expected = [*pair, pair[0], (BAD, "REJECTED too")] if side == "several" else pair
    assert answers(train) == expected
    assert bytes(train.token_ids(0))[:20] == bytes(train.token_ids(1))[:20]


@pytest.mark.parametrize(("column", "good", "bad"), RATINGS)
def test_kto_stores_good_and_bad_answers(tmp_path: Path, column: str, good: Any, bad: Any) -> None:
    rows = [
        {"prompt": "Which?", "completion": "This.", column: good},
        {"prompt": "Which?", "completion": "That.", column: bad},
        {"prompt": "Which?", "completion": "Those.", column: good},
    ]
    stored = answers(prepared(tmp_path, rows, "kto").train)
    assert stored == [(GOOD, "This."), (BAD, "That."), (GOOD, "Those.")]


def test_a_rating_is_of_the_last_answer_only(tmp_path: Path) -> None:
    turns = [("user", "Which?"), ("assistant", "This."), ("user", "Sure?"), ("assistant", "Yes.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    stored = prepared(tmp_path, [{"messages": messages, "label": True}], "kto")
    assert answers(stored.train) == [(GOOD, "Yes.")]


def test_kto_takes_pairs_as_two_rated_answers(tmp_path: Path) -> None:
    row = {"prompt": "Which?", "chosen": "This.", "rejected": ["That.", "Those."]}
    stored = prepared(tmp_path, [row], "kto")
    assert answers(stored.train) == [(GOOD, "This."), (BAD, "That."), (BAD, "Those.")]
    assert stored.counts.samples == 3


def test_texts_share_their_beginning_as_the_prompt(tmp_path: Path) -> None:
    row = {"chosen": "Which one is it? This.", "rejected": "Which one is it? No."}
    assert answers(prepared(tmp_path, [row], "simpo").train) == [(GOOD, "This."), (BAD, "No.")]


def test_a_pair_without_room_for_one_answer_is_left_out(tmp_path: Path) -> None:
    pair = {"prompt": "Which?", "chosen": "This.", "rejected": "That."}
    long = {"prompt": "Which?", "chosen": "This.", "rejected": "That. " * 100}
    stored = prepared(tmp_path, [pair, long], "orpo", overflow="drop", max_length=64)
    assert answers(stored.train) == [(GOOD, "This."), (BAD, "That.")]
    assert (stored.counts.samples, stored.counts.dropped) == (1, 1)


@pytest.mark.parametrize(
    ("method", "overflow", "samples", "dropped", "cut"),
    [("dpo", "drop", 10, 20, 0), ("dpo", "cut-right", 30, 0, 20), ("kto", "drop", 30, 30, 0)],
)
def test_long_pairs_are_counted_once(
    tmp_path: Path, method: Preferences, overflow: Any, samples: int, dropped: int, cut: int
) -> None:
    short, long = "This.", "That. " * 100
    sides = [(short, "No."), (short, long), (long, f"{long}!")]
    rows = [
        {"prompt": f"Which {n}?", "chosen": chosen, "rejected": rejected}
        for n, (chosen, rejected) in enumerate(sides * 10)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(preferences=method, overflow=overflow, max_length=64)
    report = inspect(Source(path=str(file)), CHATML, data)
    assert report.too_long == 20
    assert (report.counts.samples, report.counts.dropped, report.counts.cut) == (samples, dropped, cut)
    assert [problem.count for problem in report.problems if problem.kind == "too-long"] == [20]


def test_kto_leaves_only_the_answer_without_room_out(tmp_path: Path) -> None:
    long = {"prompt": "Which?", "chosen": "This.", "rejected": "That. " * 100}
    stored = prepared(tmp_path, [long], "kto", overflow="drop", max_length=64)
    assert answers(stored.train) == [(GOOD, "This.")]


def test_a_shown_row_without_room_names_no_sides(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Which?", "chosen": "This.", "rejected": "That. " * 100}))
    data = Data(preferences="dpo", overflow="drop", max_length=64)
    shown = show(Source(path=str(file)), 1, CHATML, data)
    assert (len(shown.samples), shown.sides) == (1, ())


def test_both_sides_of_a_pair_are_in_one_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"Which {n}?", "chosen": f"This {n}.", "rejected": f"That {n}."} for n in range(20)]
    stored = prepared(tmp_path, rows, "dpo", validation_fraction=0.25)
    for samples in (stored.train, stored.validation):
        assert len(samples)
        for (good, chosen), (bad, rejected) in zip(*[iter(answers(samples))] * 2, strict=True):
            assert (good, bad) == (GOOD, BAD)
            assert chosen.split()[1:] == rejected.split()[1:]


def test_the_samples_of_one_side_keep_their_order(tmp_path: Path) -> None:
    rows = [{"prompt": "Which?", "chosen": f"This {n}.", "rejected": "That."} for n in range(3)]
    train = prepared(tmp_path, rows, "dpo").train
    assert answers(train.of_side(GOOD)) == [(GOOD, f"This {n}.") for n in range(3)]


@pytest.mark.parametrize(("most", "spread"), [(2, [0, 2]), (3, [0, 1, 3]), (9, [0, 1, 2, 3, 4])])
def test_a_selection_is_spread_over_the_samples(tmp_path: Path, most: int, spread: list[int]) -> None:
    rows = [{"prompt": "Which?", "chosen": f"This {n}.", "rejected": "That."} for n in range(5)]
    samples = prepared(tmp_path, rows, "dpo").train.of_side(GOOD).spread(most)
    assert answers(samples) == [(GOOD, f"This {n}.") for n in spread]


def test_methods_for_pairs_share_what_is_stored(tmp_path: Path) -> None:
    pair = {"prompt": "Which?", "chosen": "This.", "rejected": "That."}
    methods: tuple[Preferences, ...] = ("dpo", "orpo", "simpo", "kto", "chosen")
    stored = [prepared(tmp_path, [pair], method).cached for method in methods]
    assert stored == [False, True, True, False, False]


def test_a_set_without_method_keeps_its_earlier_key() -> None:
    columns = {"text": "story"}
    layout = _layout_key(RowFormat("text", columns))
    assert layout == {"format": "text", "columns": columns, "label_names": ()}


def test_a_method_needs_data_to_compare() -> None:
    plain = Row(1, {"prompt": "Which?", "completion": "This."})
    with pytest.raises(UserError, match="No preferences in the data"):
        detect([plain], "file", preference_choice="dpo")
    with pytest.raises(UserError, match="No preferences in the data"):
        detect([plain], "file", preference_choice="kto")
    rated = Row(1, {"prompt": "Which?", "completion": "This.", "label": True})
    with pytest.raises(UserError, match="Rated answers") as raised:
        detect([rated], "file", preference_choice="orpo")
    assert 'data.preferences = "kto"' in raised.value.fix


def test_media_are_named_before_a_missing_comparison() -> None:
    row = Row(1, {"prompt": "Which?", "completion": "This.", "images": ["a.jpg"]})
    with pytest.raises(UserError, match="images"):
        detect([row], "file", preference_choice="dpo")


def refusal(method: Preferences, usable: dict[str, Any], row: dict[str, Any]) -> tuple[str, str]:
    """Kind and reason with which a row is rejected, in a file whose other rows are like ``usable``."""
    layout = detect([Row(1, usable)], "file", preference_choice=method).layout
    parse(Row(1, usable), layout)
    with pytest.raises(RowRejectedError) as raised:
        parse(Row(2, usable | row), layout)
    return raised.value.kind, raised.value.reason


@pytest.mark.parametrize(
    ("rejected", "expected"),
    [
        ("", ("empty-row", "The rejected answer is empty.")),
        (["That.", " "], ("empty-row", "The rejected answer is empty.")),
        ("<image>", ("media", "Turn 2 has the placeholder <image>.")),
    ],
)
def test_a_pair_needs_text_on_its_rejected_side(rejected: Any, expected: tuple[str, str]) -> None:
    pair = {"prompt": "Which?", "chosen": "This.", "rejected": "That."}
    assert refusal("dpo", pair, {"rejected": rejected}) == expected


@pytest.mark.parametrize("roles", [("assistant",), ("user", "assistant", "user")])
def test_a_rating_needs_a_prompt_and_an_answer(roles: tuple[str, ...]) -> None:
    usable, row = (
        {"messages": [{"role": role, "content": "Which?"} for role in turns], "label": True}
        for turns in (("user", "assistant"), roles)
    )
    reason = "A rating needs a prompt, and an answer after it."
    assert refusal("kto", usable, row) == ("no-answer", reason)


def test_a_template_that_refuses_one_side_refuses_the_pair(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "That."}
    pair = {"prompt": "Which?", "chosen": "This.", "rejected": "That."}
    source = Source(path=str(tmp_path / "rows.jsonl"))
    rows = [pair, {**pair, "prompt": "Who?", "rejected": [answer, answer]}]
    Path(source.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(sources=(source,), preferences="dpo", validation_fraction=0.0)
    stored = prepare_dataset(Recipe(data=data), family("no-system"))
    assert [side for side, _ in answers(stored.train)] == [GOOD, BAD]
    assert [(problem.kind, problem.rows) for problem in stored.problems] == [("template-refuses", (2,))]


def test_sides_of_some_samples_only_are_damage(tmp_path: Path) -> None:
    pair = {"prompt": "Which?", "chosen": "This.", "rejected": "That."}
    folder = prepared(tmp_path, [pair], "dpo").folder
    Store(folder)
    (folder / "sides.u8").write_bytes(bytes([GOOD]))
    with pytest.raises(ValueError, match="is incomplete"):
        Store(folder)


def test_refused_preferences_name_the_methods(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "Which?", "chosen": "This.", "rejected": "That."}\n')
    with pytest.raises(UserError) as raised:
        inspect(Source(path=str(file)))
    assert 'data.preferences = "orpo" (or "dpo", "simpo")' in raised.value.fix


def test_a_shown_row_has_both_sides(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "Which?", "chosen": "This.", "rejected": "That."}\n')
    shown = show(Source(path=str(file)), 1, CHATML, Data(preferences="dpo"))
    assert shown.sides == ("chosen", "rejected")
    assert ["".join(piece.text for piece in s if piece.in_loss) for s in shown.samples] == [
        "This.<|im_end|>\n",
        "That.<|im_end|>\n",
    ]
