"""Rows that are nearly the same, by the smallest hashes of their word triples (a bottom-k MinHash sketch).

Two rows are near duplicates if they share at least ``ALIKE`` of their word triples, as estimated
from their sketches (Broder, "On the resemblance and containment of documents", 1997). Only the
first ``MOST_ROWS`` rows are looked at, so that time and memory stay bounded. Used by ``inspect``.
"""

from __future__ import annotations

import re
from array import array
from zlib import crc32

from qlora_tui.data.conversation import Conversation

MOST_ROWS = 100_000
ALIKE = 0.8
_SKETCH = 32
_PROBES = 4
_FEWEST_WORDS = 12
"""Shorter rows share triples by chance."""
_WORDS = re.compile(r"\w+")


class NearDuplicates:
    """Sketches of the rows seen so far."""

    def __init__(self) -> None:
        self._by_hash: dict[int, int] = {}
        self._sketches: list[array[int]] = []
        self._rows: list[int] = []

    def earlier(self, conversation: Conversation, row: int) -> int | None:
        """An earlier row that is nearly the same, if there is one; ``row`` is remembered."""
        if len(self._rows) >= MOST_ROWS:
            return None
        sketch = _sketch(conversation)
        if not sketch:
            return None
        found = None
        for value in sketch[:_PROBES]:
            other = self._by_hash.get(value)
            if other is not None and _alike(sketch, self._sketches[other]) >= ALIKE:
                found = self._rows[other]
                break
        for value in sketch[:_PROBES]:
            self._by_hash.setdefault(value, len(self._rows))
        self._rows.append(row)
        self._sketches.append(sketch)
        return found


def _sketch(conversation: Conversation) -> array[int]:
    text = conversation.text or " ".join(m.content for m in conversation.messages if m.role != "system")
    words = _WORDS.findall(text.lower())
    if len(words) < _FEWEST_WORDS:
        return array("I")
    triples = {crc32(f"{a} {b} {c}".encode()) for a, b, c in zip(words, words[1:], words[2:], strict=False)}
    return array("I", sorted(triples)[:_SKETCH])


def _alike(one: array[int], other: array[int]) -> float:
    """The share of triples two rows have in common: of the smallest of both, those that are in each."""
    smallest = sorted({*one, *other})[: max(len(one), len(other))]
    both = set(one) & set(other)
    return sum(value in both for value in smallest) / len(smallest)
