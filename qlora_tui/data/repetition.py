"""Finds answers that repeat themselves, and answers that contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from zlib import crc32

_MAX_BLOCK_WORDS = 60
_MAX_CHARACTERS = 4000
"""Number of characters at the end of a text that are searched."""
_LEAST_REPEATS = 3
_REPEATS_OF_SHORT_BLOCKS = {1: 10, 2: 5}
"""Times that one or two words must occur in a row to be a loop, because ``no, no, no`` is none."""
_SENTENCE_ENDS = (".", "!", "?", "…")
_MARKS = ".,;:!?…\"'“”‘’()[]{}*_`"
"""Punctuation that is removed from both ends of a word."""
_FENCE = "```"
_TABLE = "|"


def find_loop(text: str) -> str:
    """Return the text that repeats at the end of ``text``; empty if none does.

    A sentence, or any three or more words, must occur three times in a row, and fewer words more often. Code
    and tables may repeat themselves.
    """
    if text.count(_FENCE) % 2:
        return ""
    end = text[-_MAX_CHARACTERS:].split()
    plain = [word.strip(_MARKS).casefold() for word in end]
    for length in range(1, min(_MAX_BLOCK_WORDS, len(plain) // _LEAST_REPEATS) + 1):
        block = plain[-length:]
        if plain[-2 * length : -length] != block:
            continue
        repeats = _REPEATS_OF_SHORT_BLOCKS.get(length, _LEAST_REPEATS)
        if length > 1 and end[-1].endswith(_SENTENCE_ENDS):
            repeats = _LEAST_REPEATS
        if len(plain) >= repeats * length and plain[-repeats * length :] == block * repeats:
            phrase = " ".join(end[-length:])
            if any(character.isalpha() for character in phrase) and _TABLE not in phrase:
                return phrase
    return ""


SAME_PROMPT = 0.8
"""Minimum share of common word pairs with which two prompts count as the same."""
OTHER_ANSWER = 0.2
"""Maximum share of common words with which two answers count as different."""
_PROBES = 6
_MOST_ALIKE = 50
"""Maximum number of rows with one prompt that are compared with each other."""


def find_contradictions(rows: Sequence[tuple[str, str]]) -> dict[int, int]:
    """Map each row that contradicts another row to that row, by their indices in ``rows``.

    Rows are pairs of prompt and answer.
    """
    prompts = [_pairs(prompt) for prompt, _ in rows]
    answers = [frozenset(words(answer)) for _, answer in rows]
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


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation at their ends."""
    return [word for each in text.split() if (word := each.strip(_MARKS).casefold())]


def _pairs(text: str) -> frozenset[tuple[str, ...]]:
    found = words(text)
    return frozenset(pairwise(found)) if len(found) > 1 else frozenset((word,) for word in found)


def _probes(pairs: frozenset[tuple[str, ...]]) -> list[int]:
    return sorted(crc32(" ".join(pair).encode()) for pair in pairs)[:_PROBES]


def _share(one: frozenset[object], other: frozenset[object]) -> float:
    return len(one & other) / max(1, len(one | other))
