from __future__ import annotations

from bench.support.turns import in_turn


def test_every_second_repeat_measures_in_reversed_order() -> None:
    assert [in_turn({"ours": 1, "theirs": 2}, repeat) for repeat in range(3)] == [
        ["ours", "theirs"],
        ["theirs", "ours"],
        ["ours", "theirs"],
    ]
