"""Compares an answer with its reference: as words, as a label, as JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

_FENCE = re.compile(r"\A```[a-zA-Z]*\n(.*?)\n?```\Z", re.DOTALL)
_EDGES = ".,;:!?…\"'“”‘’()[]{}*_`"
"""Marks at the edges of a word that do not count."""


class NotJsonError(ValueError):
    """A text is not JSON."""


def words(text: str) -> list[str]:
    """The words of a text, without case and without marks at their edges."""
    return [word for each in text.split() if (word := each.strip(_EDGES).casefold())]


def same_words(one: str, other: str) -> bool:
    """Whether two texts have the same words in the same order; texts without words are compared whole."""
    first, second = words(one), words(other)
    return first == second if first or second else one.strip() == other.strip()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of the share of the answer's words in the reference and of the reference's in the answer.

    Repeated words count as often as they occur in both, as in SQuAD (Rajpurkar et al. 2016, section 6.1).
    """
    ours, theirs = words(answer), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def parse_json(text: str) -> Any:
    """The object or array that a text is, alone or in one code fence.

    Raises:
        NotJsonError: it is anything else, also JSON with text around it.
    """
    inner = text.strip()
    if fenced := _FENCE.match(inner):
        inner = fenced[1].strip()
    if not inner.startswith(("{", "[")):
        raise NotJsonError("It is no object or array.")
    try:
        return json.loads(inner, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise NotJsonError(str(error)) from error


def is_json(text: str) -> bool:
    """Whether a text is an object or array of JSON and nothing else."""
    try:
        parse_json(text)
    except NotJsonError:
        return False
    return True


def same_json(one: str, other: str) -> bool:
    """Whether two texts are JSON of the same value."""
    try:
        return bool(parse_json(one) == parse_json(other))
    except (NotJsonError, RecursionError):
        return False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON.")
