"""The demo's data has one style, no repetitions, and none of the held-out prompts."""

from __future__ import annotations

import json
import re
from typing import TypedDict

import pytest

from qlora_tui.demo.conversations import CONVERSATIONS, HELD_OUT

OPENING, CLOSING = "Keeper's log: ", " The light turns."


class Message(TypedDict):
    role: str
    content: str


def conversations() -> list[list[Message]]:
    rows = CONVERSATIONS.read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["messages"] for row in rows]


def said_by(role: str) -> list[str]:
    return [message["content"] for turns in conversations() for message in turns if message["role"] == role]


def plain(text: str) -> str:
    """Words only, to find repetitions that differ in a comma."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


SMALL_WORDS = plain("a about am at do does how i in is make my of the to what who why").split()


def test_there_are_enough_answers() -> None:
    assert len(said_by("assistant")) >= 200


def test_user_and_assistant_take_turns() -> None:
    for turns in conversations():
        roles = [message["role"] for message in turns]
        assert roles in (["user", "assistant"] * turns for turns in (1, 2, 3))


def test_a_third_of_the_conversations_has_more_turns() -> None:
    assert sum(len(turns) > 2 for turns in conversations()) >= len(conversations()) / 3


def test_twenty_questions_are_held_out() -> None:
    assert sum(map(len, HELD_OUT)) == 20


def test_every_answer_is_a_short_entry_in_the_log() -> None:
    for answer in said_by("assistant"):
        assert answer.startswith(OPENING)
        assert answer.endswith(CLOSING)
        entry = answer.removeprefix(OPENING).removesuffix(CLOSING)
        assert 15 <= len(entry.split()) <= 35, entry
        assert entry[-1] in ".!?"


def test_everything_is_printable_ascii() -> None:
    for text in said_by("user") + said_by("assistant"):
        assert text.isascii()
        assert text.isprintable()


def test_nothing_is_asked_or_answered_twice() -> None:
    first_questions = [plain(turns[0]["content"]) for turns in conversations()]
    assert len(set(first_questions)) == len(first_questions)
    answers = [plain(answer) for answer in said_by("assistant")]
    assert len(set(answers)) == len(answers)


def test_no_two_answers_begin_alike() -> None:
    openings = [tuple(plain(answer.removeprefix(OPENING)).split()[:3]) for answer in said_by("assistant")]
    assert len(set(openings)) == len(openings)


@pytest.mark.parametrize("prompt", [question for questions in HELD_OUT for question in questions[:1]])
def test_no_training_question_contains_a_held_out_prompt(prompt: str) -> None:
    words = set(plain(prompt).split()).difference(SMALL_WORDS)
    assert words
    for question in said_by("user"):
        assert not words <= set(plain(question).split()), question
