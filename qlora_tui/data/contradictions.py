"""Rows whose prompts are nearly the same and whose answers are not: at most one of them can be right."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from zlib import crc32

SAME_PROMPT = 0.8
"""Least share of word pairs that two prompts have in common."""
OTHER_ANSWER = 0.2
"""Most of the words that two answers have in common."""
_PROBES = 6
_MARKS = ".,;:!?…\"'“”‘’()[]*_`"
_MOST_ALIKE = 50
"""Rows with one prompt that are compared with each other."""


def find_contradictions(rows: Sequence[tuple[str, str]]) -> dict[int, int]:
    """For each row that contradicts another, that row: indices in ``rows``, which are (prompt, answer)."""
    prompts = [_pairs(prompt) for prompt, _ in rows]
    answers = [frozenset(_words(answer)) for _, answer in rows]
    alike: dict[int, list[int]] = {}
    contradicts: dict[int, int] = {}
    for number, pairs in enumerate(prompts):
        others = {other for value in _probes(pairs) for other in alike.get(value, ())}
        for other in sorted(others):
            if (
                _share(pairs, prompts[other]) >= SAME_PROMPT
                and _share(answers[number], answers[other]) <= OTHER_ANSWER
            ):
                contradicts.setdefault(number, other)
                contradicts.setdefault(other, number)
        for value in _probes(pairs):
            bucket = alike.setdefault(value, [])
            if len(bucket) < _MOST_ALIKE:
                bucket.append(number)
    return contradicts


def _words(text: str) -> list[str]:
    return [word for each in text.split() if (word := each.strip(_MARKS).casefold())]


def _pairs(text: str) -> frozenset[tuple[str, ...]]:
    words = _words(text)
    return frozenset(pairwise(words)) if len(words) > 1 else frozenset((word,) for word in words)


def _probes(pairs: frozenset[tuple[str, ...]]) -> list[int]:
    return sorted(crc32(" ".join(pair).encode()) for pair in pairs)[:_PROBES]


def _share(one: frozenset[object], other: frozenset[object]) -> float:
    return len(one & other) / max(1, len(one | other))
