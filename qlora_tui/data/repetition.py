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
"""Number of times that one word, or two words, must occur in a row to count as a loop, because ``no, no, no``
is not a loop.
"""
_SENTENCE_ENDS = (".", "!", "?", "…")
_MARKS = ".,;:!?…\"'“”‘’()[]{}*_`"
"""Punctuation that is removed from both ends of a word."""
_FENCE = "```"
_TABLE = "|"


def find_loop(text: str) -> str:
    """Return the text that repeats at the end of ``text``; empty if none does.

    A sentence, or any three or more words, must occur three times in a row, and fewer words more often.
    Repetition in a table, or in a code block that is still open, does not count.
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
"""Minimum share of word pairs that two prompts must have in common to count as the same."""
OTHER_ANSWER = 0.2
"""Maximum share of words that two answers can have in common and still count as different."""
_PROBES = 6
_MOST_ALIKE = 50
"""Maximum number of rows that are stored for one word pair, to be compared with later rows."""


def find_contradictions(rows: Sequence[tuple[str, str]]) -> dict[int, int]:
    """Map the index of each row that contradicts another row to the index of that other row.

    Each row is a prompt and its answer.
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
