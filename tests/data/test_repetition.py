from __future__ import annotations

import pytest

from qlora_tui.data.repetition import find_loop


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("Keeper's log: calm. " + "The light turns. " * 3, "The light turns."),
        ("Fresh air, no wind, " + "no sea, " * 5, "no sea,"),
        ("It goes on and on, " + "over the hill and far away " * 3, "over the hill and far away"),
        ("Well. " + "I see! " * 3, "I see!"),
        ("ha " * 10, "ha"),
        ("Yes. 1. wash it well\n2. rinse\n" + "3. then wait for it\n" * 3, "3. then wait for it"),
    ],
)
def test_a_sentence_or_words_repeated_are_a_loop(text: str, loop: str) -> None:
    assert find_loop(text) == loop


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No, no, no! Not that one.",
        "The light turns. The light turns.",
        "The light turns. It is late. The light turns. It is late. The light turns.",
        "ha ha ha ha",
        "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
        "| a | b |\n" + "| yes | yes |\n" * 4,
        "```html\n" + "</div> </div> </div>\n" * 6,
        "very, very, very good",
    ],
)
def test_other_repetition_is_no_loop(text: str) -> None:
    assert find_loop(text) == ""


def test_a_loop_is_seen_as_soon_as_it_closes() -> None:
    text = "Low wind. " + "The light turns. " * 9
    seen = next(end for end in range(len(text)) if find_loop(text[:end]))
    assert text[:seen].count("The light turns") == 3


def test_a_long_answer_costs_little() -> None:
    text = " ".join(f"word{number % 997}" for number in range(50_000))
    assert find_loop(text) == ""
