"""Whether answers decide between a few options."""

from __future__ import annotations

import json
from collections import Counter
from datetime import date

import pytest

from qlora_tui.data.decisions import MOST_OPTIONS, decision_of
from qlora_tui.data.formats import detect, parse
from qlora_tui.data.row import Row
from qlora_tui.errors import UserError
from qlora_tui.recipe.toml import to_recipe


@pytest.mark.parametrize(
    ("answers", "options"),
    [
        (["no", "yes"] * 3 + ["no"], ("no", "yes")),
        (["no", "yes"], None),  # too few rows for two labels
        (["no"] * 9, None),
        ([f"town {number}" for number in range(9)], None),
        (["the same long answer, which returns, with nine words or more", "no"] * 9, None),
        ([str(number % (MOST_OPTIONS + 1)) for number in range(2000)], None),
    ],
)
def test_a_few_short_answers_that_return_are_options(
    answers: list[str], options: tuple[str, ...] | None
) -> None:
    decision = decision_of(Counter(answers))
    assert (decision and decision.options) == options


def test_objects_have_every_combination_of_their_values() -> None:
    rows = [{"kind": "bug", "urgent": True}, {"kind": "wish", "urgent": False}] * 6
    decision = decision_of(Counter(map(json.dumps, rows)))
    assert decision is not None and decision.fields == ("kind", "urgent")
    assert len(decision.options) == 4 and '{"kind": "bug", "urgent": false}' in decision.options
    assert decision.values("kind") == {"bug": [0, 2], "wish": [1, 3]}
    # Written in different ways: which one an unseen combination has is unknown.
    mixed = [json.dumps(rows[0]), json.dumps(rows[1], separators=(",", ":"))] * 6
    seen = decision_of(Counter(mixed))
    assert seen is not None and len(seen.options) == 2
    assert decision_of(Counter(json.dumps({"id": number}) for number in range(20))) is None


def test_a_file_of_decisions_says_so() -> None:
    labels = [{"kind": "ab"[number % 2], "urgent": number % 3 == 0} for number in range(30)]
    rows = [Row(number, {"text": f"t{number}", "label": label}) for number, label in enumerate(labels)]
    detection = detect(rows, "f")
    assert detection.layout.format == "decision"
    assert "2 enumerated fields: kind, urgent" in detection.evidence[-1]
    alpaca = [Row(number, {"instruction": f"t{number}", "output": "yn"[number % 2]}) for number in range(9)]
    assert "2 labels: y, n" in detect(alpaca, "f").evidence[-1]
    texts = [Row(number, {"text": "t", "label": {"name": f"n{number}"}}) for number in range(30)]
    assert detect(texts, "f").layout.format == "text"


def test_the_only_column_of_texts_next_to_labels_is_what_is_decided() -> None:
    def columns(**more: str) -> dict[str, str] | None:
        values = [
            {"id": number, "mail": f"where is parcel {number}", "label": "yn"[number % 2], **more}
            for number in range(9)
        ]
        try:
            return detect([Row(number, value) for number, value in enumerate(values)], "f").layout.columns
        except UserError:
            return None

    assert columns(sent="2026-01-01") == {"text": "mail", "label": "label"}
    assert columns(reply="it is on its way") is None


def test_dates_in_objects_are_texts() -> None:
    """JSON has none, but a Parquet file may."""
    labels = [{"day": date(2026, 1, 1 + number % 3), "kind": "ab"[number % 2]} for number in range(30)]
    rows = [Row(number, {"text": f"t{number}", "label": label}) for number, label in enumerate(labels)]
    layout = detect(rows, "f").layout
    assert layout.format == "decision"
    assert parse(rows[0], layout).messages[-1].content == '{"day": "2026-01-01", "kind": "a"}'
    pairs = [Row(number, {"prompt": "t", "completion": label}) for number, label in enumerate(labels)]
    assert '"2026-01-02"' in parse(pairs[1], detect(pairs, "f").layout).messages[-1].content


def test_the_earlier_name_of_the_format_is_read() -> None:
    recipe = to_recipe({"data": {"sources": [{"path": "a.jsonl", "format": "label"}]}})
    assert recipe.data.sources[0].format == "decision"
