"""What can be counted in general answers by a rule: ends, loops, refusals and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from qlora_tui.data.repetition import find_loop

_REFUSALS = (
    "i can't",
    "i cannot",
    "i can not",
    "i won't",
    "i'm sorry, but",
    "i am sorry, but",
    "sorry, but i",
    "sorry, i",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "i am not able",
    "as an ai",
    "i must decline",
)
_REFUSAL_CHARACTERS = 80
"""A refusal is one of these words within so many first characters of an answer."""


@dataclass(frozen=True)
class GeneralAnswer:
    """One answer as text."""

    prompt: str
    text: str
    ended: bool
    """Whether the model ended the turn itself."""


class AnswerCounts(NamedTuple):
    """Counts over answers, which can be added over processes."""

    answers: int
    ended: int
    looping: int
    refused: int
    json_prompts: int
    json_valid: int


def count_answers(answers: Iterable[GeneralAnswer]) -> AnswerCounts:
    """Count the answers that end, loop, refuse, and hold the JSON that was asked for."""
    every = list(answers)
    with_json = [answer for answer in every if asks_for_json(answer.prompt)]
    return AnswerCounts(
        answers=len(every),
        ended=sum(answer.ended for answer in every),
        looping=sum(bool(find_loop(answer.text)) for answer in every),
        refused=sum(is_refusal(answer.text) for answer in every),
        json_prompts=len(with_json),
        json_valid=sum(holds_json(answer.text) for answer in with_json),
    )


def asks_for_json(prompt: str) -> bool:
    """Whether a prompt asks for JSON."""
    return "JSON" in prompt


def is_refusal(text: str) -> bool:
    """Whether an answer begins with a refusal."""
    beginning = text[:_REFUSAL_CHARACTERS].casefold().replace("’", "'")
    return any(phrase in beginning for phrase in _REFUSALS)


def holds_json(text: str) -> bool:
    """Whether there is an object or array of JSON from the first bracket of a text to the last."""
    starts = [place for place in (text.find("{"), text.find("[")) if place >= 0]
    if not starts:
        return False
    start = min(starts)
    end = text.rfind("}" if text[start] == "{" else "]")
    try:
        json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        return False
    return True
