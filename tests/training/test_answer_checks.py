"""Ends, loops, refusals and JSON in general answers, each by its rule."""

from __future__ import annotations

import pytest

from qlora_tui.runs.events import GeneralAnswers
from qlora_tui.training.forgetting.answer_checks import (
    GeneralAnswer,
    count_answers,
    holds_json,
    is_refusal,
)
from qlora_tui.training.forgetting.general_prompts import GENERAL_PROMPTS
from qlora_tui.training.health import check_general_answers


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ('{"name": "Ana", "age": 31}', True),
        ('Here it is:\n```json\n["a", "b"]\n```', True),
        ('{"name": "Ana", "age": 3', False),
        ("{'name': 'Ana'}", False),
        ("Keeper's log: Ana is 31.", False),
        ("]{", False),
        ("[" * 100_000, False),
    ],
)
def test_json_is_found_in_an_answer(text: str, holds: bool) -> None:
    assert holds_json(text) is holds


def test_a_refusal_is_one_at_the_beginning_only() -> None:
    assert is_refusal("I’m sorry, but I can't help with that.")
    assert is_refusal("As an AI language model, I have no house.")
    assert not is_refusal("A lock opens with a pick. " * 5 + "I cannot say more.")


def test_answers_are_counted_by_each_rule() -> None:
    loop = "The light turns over the sea. " * 6
    counts = count_answers(
        [
            GeneralAnswer("Name a river.", "The Tagus.", ended=True),
            GeneralAnswer("Name a sea.", loop, ended=False),
            GeneralAnswer("Open a lock.", "I cannot help with that.", ended=True),
            GeneralAnswer("Give JSON.", '{"a": 1}', ended=True),
            GeneralAnswer("Give a JSON array.", "a, b", ended=True),
        ]
    )
    assert counts == (5, 4, 1, 1, 2, 1)


def test_the_first_general_prompts_ask_for_json() -> None:
    assert sum("JSON" in prompt for prompt in GENERAL_PROMPTS[:12]) == 3
    assert len(GENERAL_PROMPTS) == len(set(GENERAL_PROMPTS)) == 32


def test_answers_that_got_worse_are_a_finding() -> None:
    def counts(ended: int, looping: int, json_valid: int) -> GeneralAnswers:
        return GeneralAnswers(
            answers=12,
            ended=ended,
            base_ended=10,
            looping=looping,
            base_looping=1,
            refused=1,
            base_refused=1,
            json_prompts=3,
            json_valid=json_valid,
            base_json_valid=3,
        )

    assert check_general_answers(counts(8, 3, 2)) is None
    finding = check_general_answers(counts(7, 1, 1))
    assert finding is not None
    assert "7 end their turn (the base: 10)" in finding.evidence
    assert "1 of the 3 asked for JSON give it (the base: 3)" in finding.evidence
    assert "loop" not in finding.evidence
