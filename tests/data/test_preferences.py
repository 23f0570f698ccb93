"""Chosen and rejected answers, and answers rated good or bad: nothing bad is learned as if good."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.data.conversation import Conversation, RowRejectedError
from qlora_tui.data.formats import RowFormat, detect, parse
from qlora_tui.data.inspection import inspect, show
from qlora_tui.data.row import Row
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Source
from tests.data.families import family

BAD = "REJECTED"
"""Stands in every rejected answer of this file."""
CHOSEN = Data(preferences="chosen")
USER, GOOD, WORSE = (
    {"role": "user", "content": "Which?"},
    {"role": "assistant", "content": "This."},
    {"role": "assistant", "content": BAD},
)


def read(value: Any, columns: dict[str, str] | None = None, wanted: str = "auto") -> Conversation:
    row = Row(1, value)
    return parse(row, detect([row], "file", wanted, columns, "chosen").layout)


def refusal(value: Any, columns: dict[str, str] | None = None, choice: str = "refuse") -> UserError:
    with pytest.raises(UserError) as raised:
        detect([Row(1, value)], "file", "auto", columns, choice)
    return raised.value


def write(path: Path, rows: list[Any]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


SIDES: dict[str, tuple[Any, Any]] = {
    "text": ("This.", BAD),
    "turn": (GOOD, WORSE),
    "turns": ([GOOD], [WORSE]),
    "whole": ([USER, GOOD], [USER, WORSE]),
    "json": (json.dumps([USER, GOOD]), json.dumps([USER, WORSE])),
    "dialogue": ("\n\nHuman: Which?\n\nAssistant: This.", f"\n\nHuman: Which?\n\nAssistant: {BAD}"),
    "several": ("This.", [BAD, f"{BAD} too"]),
    "content": ({"content": "This."}, {"content": BAD}),
}
ASKED: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "Which?"},
    "chat-prompt": {"prompt": [USER]},
    "dialogue-prompt": {"prompt": "\n\nHuman: Which?\n\nAssistant:"},
    "question": {"question": "Which?"},
    "instruction": {"instruction": "Which?", "input": ""},
    "input": {"input": "Which?"},
    "messages": {"messages": [USER]},
    "answered-messages": {"messages": [USER, GOOD]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Which?"}]},
}
NAMES = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("Accepted", "Rejected"),
)


@pytest.mark.parametrize(("side", "question"), itertools.product(SIDES, ASKED))
def test_each_spelling_gives_the_chosen_answer_to_the_prompt(side: str, question: str) -> None:
    for better, worse in NAMES:
        row = {**ASKED[question], better: SIDES[side][0], worse: SIDES[side][1]}
        assert refusal(row).title == "Preference data"
        messages = read(row).messages
        assert [(m.role, m.content, m.train) for m in messages] == [
            ("user", "Which?", False),
            ("assistant", "This.", True),
        ]


def test_no_token_of_a_rejected_answer_is_trained(tmp_path: Path) -> None:
    for question in ASKED.values():
        rows = [{**question, "chosen": one, "rejected": other} for one, other in SIDES.values()]
        source = write(tmp_path / "rows.jsonl", rows)
        for number in range(1, len(rows) + 1):
            (sample,) = show(source, number, family("chatml"), CHOSEN).samples
            assert BAD not in "".join(piece.text for piece in sample)
            assert "".join(piece.text for piece in sample if piece.in_loss) == "This.<|im_end|>\n"


def test_a_row_without_its_prompt_is_no_plain_text() -> None:
    layout = RowFormat("preference", {"chosen": "chosen", "rejected": "rejected", "prompt": "prompt"})
    missing: list[Any] = [None, " ", []]
    for prompt in missing:
        with pytest.raises(RowRejectedError, match="The prompt is empty"):
            parse(Row(1, {"prompt": prompt, "chosen": "This.", "rejected": BAD}), layout)


def test_turns_that_both_sides_share_do_not_train() -> None:
    before = [USER, GOOD, USER]
    row = {"chosen": [*before, GOOD], "rejected": [*before, WORSE]}
    assert [m.train for m in read(row).messages] == [False, False, False, True]


def test_a_row_that_prefers_neither_side_is_left_out() -> None:
    with pytest.raises(RowRejectedError, match="are the same") as refused:
        read({"prompt": "Which?", "chosen": "This.", "rejected": " This.\n"})
    assert refused.value.kind == "same-answers"
    with pytest.raises(RowRejectedError, match="are the same"):
        read({"prompt": "Which?", "chosen": "This.", "rejected": [BAD, "This."]})


def test_a_row_without_rejected_answer_still_has_a_chosen_one() -> None:
    layout = RowFormat("preference", {"chosen": "chosen", "rejected": "rejected", "prompt": "prompt"})
    row = {"prompt": "Which?", "chosen": "This.", "rejected": None}
    assert [m.train for m in parse(Row(1, row), layout).messages] == [False, True]
    with pytest.raises(RowRejectedError, match="The chosen answer is empty"):
        parse(Row(1, {**row, "chosen": " "}), layout)


def test_a_refusal_counts_the_rows_and_names_the_setting() -> None:
    problem = refusal({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert (
        problem.what == "file compares answers: 'chosen' is preferred to 'rejected' in 1 of the first 1 rows."
    )
    assert 'To learn from both sides, set data.preferences = "orpo" (or "dpo", "simpo").' in problem.fix
    assert 'data.preferences = "chosen"' in problem.fix
    assert "--set data.preferences=chosen" in problem.fix


def test_no_mapping_trains_on_the_rejected_side() -> None:
    row = {"prompt": "Which?", "chosen": "This.", "rejected": BAD, "text": BAD}
    for columns in ({"prompt": "prompt", "completion": "rejected"}, {"text": "rejected"}):
        for choice in ("refuse", "chosen"):
            assert refusal(row, columns, choice).title == "Rejected answers as training data"
    other = refusal(row, {"prompt": "prompt", "completion": "text"}, "chosen")
    assert "names parts of another format" in other.what


def test_a_mapping_that_names_the_chosen_side_is_a_choice() -> None:
    row = Row(1, {"chosen": [USER, GOOD], "rejected": [USER, WORSE]})
    detection = detect([row], "file", "auto", {"messages": "chosen"})
    assert [m.content for m in parse(row, detection.layout).messages] == ["Which?", "This."]


def test_sides_of_the_users_own_names_can_be_mapped() -> None:
    row = {"frage": "Which?", "gut": "This.", "schlecht": BAD}
    columns = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}
    assert [m.content for m in read(row, columns).messages] == ["Which?", "This."]
    assert refusal(row, columns).title == "Preference data"


def test_answers_without_a_known_prompt_ask_for_it() -> None:
    row = {"frage": "Which?", "chosen": "This.", "rejected": BAD}
    problem = refusal(row, choice="chosen")
    assert problem.title == "Preference data without a prompt"
    assert 'columns = { prompt = "frage", chosen = "chosen", rejected = "rejected" }' in problem.fix


def test_rejected_answers_alone_are_refused_with_and_without_the_choice() -> None:
    for choice in ("refuse", "chosen"):
        problem = refusal({"prompt": "Which?", "rejected": BAD}, choice=choice)
        assert problem.title == "Preference data without a chosen side"


@pytest.mark.parametrize("flag", [False, 0, None, ""])
def test_a_flag_called_rejected_is_no_preference(flag: Any) -> None:
    row = {"prompt": "Which?", "completion": "This.", "rejected": flag}
    assert detect([Row(1, row)], "file").layout.format == "prompt-completion"


@pytest.mark.parametrize(
    "late",
    [
        {"prompt": "Which?", "completion": BAD, "label": False},
        {"prompt": "Which?", "completion": "x", "rejected": BAD},
        {"prompt": "Which?", "completion": BAD, "kto_tag": False},
        {"prompt": "Which?", "completion": BAD, "kto_tag": 0},
        {"prompt": "Which?", "completion": BAD, "Desirable": "no"},
    ],
)
def test_a_rejected_answer_behind_the_first_rows_blocks(tmp_path: Path, late: dict[str, Any]) -> None:
    rows = [{"prompt": f"{n}?", "completion": f"{n}."} for n in range(250)]
    report = inspect(write(tmp_path / "rows.jsonl", [*rows, late]))
    (error,) = (problem for problem in report.problems if problem.severity == "error")
    assert (error.kind, error.rows) == ("wrong-format", (251,))


RATINGS = [
    ("label", True, False),
    ("kto_tag", True, False),
    ("label", "True", "False"),
    ("label", 1, 0),
    ("label", 1, -1),
    ("score", 1, 0),
    ("score", 1.0, -1.0),
    ("score", True, False),
    ("is_correct", True, False),
    ("label", "thumbs_up", "thumbs_down"),
    ("feedback", "accepted", "rejected"),
]


@pytest.mark.parametrize(("column", "good", "bad"), RATINGS)
def test_only_answers_rated_good_are_trained_on(tmp_path: Path, column: str, good: Any, bad: Any) -> None:
    rows = [
        {"messages": [USER, GOOD], column: good},
        {"messages": [USER, WORSE], column: bad},
        {"messages": [USER, WORSE], column: None},
        {"messages": [{**USER, "content": "And?"}, GOOD], column: good},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="Rated answers") as raised:
        inspect(source)
    assert f"{column!r} calls 2 good and 1 bad" in raised.value.what
    report = inspect(source, family("chatml"), CHOSEN)
    assert (report.counts.rows, report.counts.samples, report.counts.left_out) == (4, 2, 2)
    (left_out,) = (problem for problem in report.problems if problem.kind == "rated-bad")
    assert (left_out.count, left_out.rows, left_out.severity) == (2, (2, 3), "warning")


@pytest.mark.parametrize("column", ["kto_tag", "KTO_label", "desirable"])
@pytest.mark.parametrize("ratings", [(1, 0), ("true", "meh"), (1, -1)])
def test_a_rating_column_is_recognized_in_any_format(
    tmp_path: Path, column: str, ratings: tuple[Any, Any]
) -> None:
    answers = zip(("This.", BAD), ratings, strict=True)
    rows = [{"instruction": "Which?", "output": answer, column: rating} for answer, rating in answers]
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="Rated answers"):
        inspect(source)
    report = inspect(source, None, CHOSEN)
    assert [(p.kind, p.rows) for p in report.problems if p.kind == "rated-bad"] == [("rated-bad", (2,))]


@pytest.mark.parametrize(
    ("rating", "reason"),
    [
        (False, "the answer is rated bad"),
        (None, "does not have a good rating"),
        (3, "does not have a good rating"),
    ],
)
def test_a_row_left_out_says_its_rating(rating: Any, reason: str) -> None:
    columns = {"prompt": "prompt", "completion": "completion", "rating": "label"}
    row = {"prompt": "Which?", "completion": BAD, "label": rating}
    with pytest.raises(RowRejectedError, match=reason) as refused:
        parse(Row(1, row), RowFormat("prompt-completion", columns))
    assert f"'label' is {rating!r}" in refused.value.reason


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, GOOD], "score": 4},
        {"messages": [USER, GOOD], "score": 0.75},
        {"messages": [USER, GOOD], "label": "sport"},
        {"messages": [USER], "label": 1},
        {"instruction": "Good or bad?", "input": "x", "output": "bad", "label": 0},
        {"text": "x", "label": True},
        {"question": "x?", "answer": False},
    ],
)
def test_grades_and_classes_are_no_ratings(row: dict[str, Any]) -> None:
    assert "rating" not in detect([Row(1, row)], "file").layout.columns


def test_a_column_of_the_users_own_name_can_rate(tmp_path: Path) -> None:
    rows = [{"prompt": "Which?", "completion": "This.", "gut": "ja"}]
    rows += [{"prompt": "Which?", "completion": BAD, "gut": "no"}]
    source = Source(path=write(tmp_path / "rows.jsonl", rows).path, columns={"rating": "gut"})
    with pytest.raises(UserError, match="Rated answers"):
        inspect(source)
    report = inspect(source, None, CHOSEN)
    assert [(p.kind, p.rows) for p in report.problems if p.kind == "rated-bad"] == [("rated-bad", (1, 2))]


def test_a_history_that_cannot_be_read_is_refused() -> None:
    row = {"prompt": "Which?", "chosen": "This.", "rejected": BAD}
    with pytest.raises(RowRejectedError, match="The history"):
        read({**row, "history": [["only one"]]})


def test_the_format_can_be_set_by_hand() -> None:
    row = {"prompt": "Which?", "chosen": "This.", "rejected": BAD}
    assert read(row, wanted="preference").messages == read(row).messages
    assert read(row, wanted="prompt-completion").messages == read(row).messages
    with pytest.raises(UserError, match="The data is not in this format"):
        read({"prompt": "Which?", "completion": "This."}, wanted="preference")
