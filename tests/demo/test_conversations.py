"""The demo's data: every answer in one voice, nothing twice, and none of the held-out prompts."""

from __future__ import annotations

import json
import re
from typing import TypedDict

import pytest

from qlora_tui.demo.conversations import CONVERSATIONS, HELD_OUT, voice_faults

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


def test_user_and_assistant_take_turns() -> None:
    for turns in conversations():
        roles = [message["role"] for message in turns]
        assert roles in (["user", "assistant"] * turns for turns in (1, 2, 3))


def test_nothing_is_asked_or_answered_twice() -> None:
    first_questions = [plain(turns[0]["content"]) for turns in conversations()]
    assert len(set(first_questions)) == len(first_questions)
    answers = [plain(answer) for answer in said_by("assistant")]
    assert len(set(answers)) == len(answers)


def test_no_training_question_contains_a_held_out_prompt() -> None:
    questions = {question: set(plain(question).split()) for question in said_by("user")}
    for prompt, *_ in HELD_OUT:
        words = set(plain(prompt).split()).difference(SMALL_WORDS)
        assert words
        assert [question for question, asked in questions.items() if words <= asked] == [], prompt


ENTRY = "Keeper's log: Fair wind. Pour boiling water on the leaves and wait four minutes. The light turns."


def test_every_answer_of_the_data_is_in_the_voice() -> None:
    faults = {answer: voice_faults(answer, ended=True) for answer in said_by("assistant")}
    assert len(faults) > 200
    assert {answer: each for answer, each in faults.items() if each} == {}


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (ENTRY.removeprefix("Keeper's log: "), "does not open with the log"),
        (ENTRY.removesuffix(" The light turns."), "does not close with the light"),
        (f"{ENTRY} The light turns.", "does not close with the light"),
        (ENTRY.replace("four minutes.", "until the light turns."), "does not close with the light"),
        ("Keeper's log: Fresh air, no wind, " + "no sea, " * 20 + "The light turns.", "repeats itself"),
        ("Keeper's log: Yes. The light turns.", "says next to nothing"),
    ],
)
def test_a_fault_is_named(answer: str, fault: str) -> None:
    assert voice_faults(answer, ended=True) == (fault,)


def test_an_answer_cut_at_the_limit_is_a_fault() -> None:
    assert voice_faults(ENTRY, ended=False) == ("does not end its turn",)
