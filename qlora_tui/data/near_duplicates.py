"""Rows that are nearly the same, by the smallest hashes of their word triples (a bottom-k MinHash sketch).

Two rows are near duplicates if they share at least ``SIMILARITY_THRESHOLD`` of their word triples, as
estimated from their sketches (Broder, "On the resemblance and containment of documents", 1997).
``NearDuplicates`` compares each row with earlier ones while rows stream by, for ``inspection``: only the
first ``MAX_ROWS``, so that time and memory stay bounded. ``near_duplicate_groups`` takes all rows at once.
"""

from __future__ import annotations

from array import array
from zlib import crc32

from qlora_tui.data.conversation import Conversation

MAX_ROWS = 100_000
SIMILARITY_THRESHOLD = 0.8
SKETCH = 32
"""Hashes in a sketch, at most."""
_PROBES = 4
_MIN_WORDS = 12
"""Minimum words of a row that is compared; shorter rows share triples by chance."""
_KNOWN_WORDS = 200_000
_SPARE = 3
"""Multiple of ``SKETCH`` hashes that are sorted for a long row, those below a bound."""
_INT64_MIN = -(1 << 63)
_PUNCTUATION = str.maketrans({c: " " for c in map(chr, range(128)) if not c.isalnum()})


class NearDuplicates:
    """Sketches of the rows read so far."""

    def __init__(self) -> None:
        self._by_hash: dict[int, int] = {}
        self._sketches: list[array[int]] = []
        self._rows: list[int] = []

    @property
    def full(self) -> bool:
        """Return whether no more rows are compared."""
        return len(self._rows) >= MAX_ROWS

    def find_earlier(self, own: array[int], row: int) -> int | None:
        """Return an earlier row nearly identical to the one with this sketch; stores ``row`` too."""
        if self.full or not own:
            return None
        earlier_row = None
        for value in own[:_PROBES]:
            other = self._by_hash.get(value)
            if other is not None and _similarity(own, self._sketches[other]) >= SIMILARITY_THRESHOLD:
                earlier_row = self._rows[other]
                break
        for value in own[:_PROBES]:
            self._by_hash.setdefault(value, len(self._rows))
        self._rows.append(row)
        self._sketches.append(own)
        return earlier_row


def minhash_sketch(conversation: Conversation) -> array[int]:
    """Return the smallest 32-bit hashes, ascending, at most ``SKETCH``; none for a row with few words."""
    text = conversation.text or " ".join(m.content for m in conversation.messages if m.role != "system")
    words = list(map(_words.__getitem__, text.lower().translate(_PUNCTUATION).split()))
    if len(words) < _MIN_WORDS:
        return array("I")
    # The hash of a tuple of integers is the same in every process, unlike that of a text.
    triples = map(hash, zip(words, words[1:], words[2:], strict=False))
    bound = _INT64_MIN + (_SPARE * SKETCH << 64) // len(words)
    few = set(filter(bound.__gt__, triples) if len(words) > 2 * _SPARE * SKETCH else triples)
    return array("I", sorted({value - _INT64_MIN >> 32 for value in sorted(few)[:SKETCH]}))


class _Words(dict[str, int]):
    """Maps a word to a 32-bit hash; cleared when there are too many."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _KNOWN_WORDS:
            self.clear()
        value = self[word] = crc32(word.encode(errors="replace"))
        return value


_words = _Words()


def _similarity(one: array[int], other: array[int]) -> float:
    """Estimate the share of triples that two rows have in common, among the smallest hashes of both."""
    smallest = sorted({*one, *other})[: max(len(one), len(other))]
    both = set(one) & set(other)
    return sum(value in both for value in smallest) / len(smallest)
