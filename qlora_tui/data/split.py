"""Selects validation rows with a seed: the same share of each source, with duplicates kept together.

Rows that share at least ``SIMILARITY_THRESHOLD`` of their word triples, as estimated from the smallest hashes
of the triples (a bottom-k MinHash sketch: Broder, "On the resemblance and containment of documents", 1997),
are near duplicates. ``NearDuplicates`` compares each row with earlier ones while rows stream by, for
``inspection``; it compares only the first ``MAX_ROWS``, so that time and memory are bounded. ``Split``
compares all rows at once, in an order derived from their content, so that the groups do not depend on the
order of the rows. Sketches stay on disk, and every step reads a slice of them, so memory stays under two
hundred bytes per row, mapped pages included. numpy is imported inside functions, because only the trainer
prepares data.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from zlib import crc32

import msgspec

from qlora_tui.data.conversation import Conversation

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


_encode = msgspec.json.Encoder().encode


def group_key(conversation: Conversation, seed: int) -> int:
    """Return a 64-bit key, equal for rows that differ only in case and white space.

    The key depends on the seed too, so that the order of the keys is the random order of the split.
    """
    words: list[str] = [conversation.text]
    for message in conversation.messages:
        words += [message.role, message.content, message.reasoning]
        if message.tool_calls:
            words.append(_encode([(c.name, c.arguments) for c in message.tool_calls]).decode())
    text = " ".join("\x1f".join(words).lower().split())
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


class Split:
    """Collects rows, then selects the validation rows."""

    def __init__(self, folder: Path, fraction: float):
        """Collect rows; ``folder`` holds their sketches until the split is decided."""
        self._fraction = fraction
        self._keys = array("Q")
        self._sources = array("H")
        self._path = folder / "sketches.u32"
        self._sketches = self._path.open("wb", buffering=1 << 20)

    @property
    def wanted(self) -> bool:
        """Return whether rows are held back for validation. Sketches are needed only then."""
        return self._fraction > 0

    def add(self, source: int, key: int, sketch: array[int]) -> None:
        """Add one row; ``key`` is its ``group_key``, ``sketch`` its ``minhash_sketch``."""
        if self.wanted:
            self._keys.append(key)
            self._sources.append(source)
            self._sketches.write(padded(sketch))

    def held_back(self) -> frozenset[int]:
        """Return the keys of the validation rows."""
        self._sketches.close()
        try:
            if not self._keys:
                return frozenset()
            groups = group_keys(self._keys, self._path)
        finally:
            self._path.unlink()
        chosen = validation_rows(groups, self._sources, self._fraction)
        return frozenset(key for key, group in zip(self._keys, groups, strict=True) if group in chosen)


def validation_rows(groups: array[int], sources: Iterable[int], fraction: float) -> frozenset[int]:
    """Select groups for validation, with up to ``fraction`` of the rows of each source, rounded.

    ``groups`` and ``sources`` have one entry per row; the group numbers define the groups' random order. If
    all groups of a source are too large, the smallest of them is selected, provided that the source has more
    than one. At least one group is selected if there are two, and at least one is left to train on.
    """
    if fraction <= 0:
        return frozenset()
    of_source = array("H", sources)
    total = Counter(of_source)
    wanted = Counter({source: round(fraction * rows) for source, rows in total.items()})
    held: Counter[int] = Counter()
    chosen: set[int] = set()
    for group, rows in _by_group(groups, of_source):
        if held == wanted:
            break
        if all(held[source] + count <= wanted[source] for source, count in rows.items()):
            chosen.add(group)
            held.update(rows)
    for source in sorted(wanted):
        if wanted[source] and not held[source]:
            others = (
                (rows.total(), group)
                for group, rows in _by_group(groups, of_source)
                if 0 < rows[source] < total[source]
            )
            chosen |= {group for _, group in sorted(others)[:1]}
    return _some_but_not_all(chosen, groups)


def _some_but_not_all(chosen: set[int], groups: array[int]) -> frozenset[int]:
    import numpy as np

    numbers, counts = np.unique(np.frombuffer(groups, dtype=np.uint64), return_counts=True)
    if len(numbers) < 2:
        return frozenset()
    chosen = chosen or {int(numbers[counts.argmin()])}
    if len(chosen) == len(numbers):
        chosen = chosen - {int(numbers[counts.argmax()])}
    return frozenset(chosen)


def _by_group(groups: array[int], sources: array[int]) -> Iterator[tuple[int, Counter[int]]]:
    """Yield each group number, ascending, with the group's number of rows by source."""
    import numpy as np

    numbers = np.frombuffer(groups, dtype=np.uint64)
    order = np.argsort(numbers)
    of_source = np.frombuffer(sources, dtype=np.uint16)
    ends = np.append(np.flatnonzero(np.diff(numbers[order])) + 1, len(order))
    start = 0
    for end in ends:
        members = order[start:end]
        yield int(numbers[members[0]]), Counter(of_source[members].tolist())
        start = end


MAX_ROWS = 100_000
SIMILARITY_THRESHOLD = 0.8
SKETCH = 32
"""Maximum number of hashes in a sketch."""
_PROBES = 4
_MIN_WORDS = 12
"""Minimum number of words of a row that is compared; shorter rows share triples by chance."""
_KNOWN_WORDS = 200_000
_SPARE = 3
"""Before the hashes of a long row are sorted, a bound reduces their number to about this multiple of
``SKETCH``.
"""
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
        """Return whether the maximum number of compared rows is reached."""
        return len(self._rows) >= MAX_ROWS

    def find_earlier(self, own: array[int], row: int) -> int | None:
        """Return an earlier row that is nearly identical to ``row``, if any, and store ``row`` for later
        calls.

        ``own`` is the sketch of ``row``.
        """
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
    """Return the smallest 32-bit hashes of a conversation's word triples, ascending, at most ``SKETCH``.

    Empty if the conversation has few words.
    """
    text = conversation.text or " ".join(m.content for m in conversation.messages if m.role != "system")
    words = list(map(_words.__getitem__, text.lower().translate(_PUNCTUATION).split()))
    if len(words) < _MIN_WORDS:
        return array("I")
    # The hash of a tuple of integers is the same in every process, unlike the hash of a text.
    triples = map(hash, zip(words, words[1:], words[2:], strict=False))
    bound = _INT64_MIN + (_SPARE * SKETCH << 64) // len(words)
    few = set(filter(bound.__gt__, triples) if len(words) > 2 * _SPARE * SKETCH else triples)
    return array("I", sorted({value - _INT64_MIN >> 32 for value in sorted(few)[:SKETCH]}))


class _Words(dict[str, int]):
    """Maps a word to a 32-bit hash; cleared when it has too many entries."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _KNOWN_WORDS:
            self.clear()
        value = self[word] = crc32(word.encode(errors="replace"))
        return value


_words = _Words()


def _similarity(one: array[int], other: array[int]) -> float:
    """Estimate from the smallest hashes of two rows what share of their triples they have in common."""
    smallest = sorted({*one, *other})[: max(len(one), len(other))]
    both = set(one) & set(other)
    return sum(value in both for value in smallest) / len(smallest)


SAME_SIDE_THRESHOLD = 0.6
"""Minimum share of word triples that two rows must have in common to be put into the same split.

Lower than for a near duplicate, because putting two more rows into the same split has no drawback.
"""
_EMPTY = 0xFFFFFFFF
"""Padding value of a sketch."""
_MIXES = tuple(random.Random(number).getrandbits(32) | 1 for number in range(12))
"""Multipliers that each reorder the hashes.

Two rows with 80 % of their triples in common have the same first two hashes in at least one of these orders,
except in 5 cases in a million.
"""
_NEIGHBORS = 8
"""Each row is compared with up to this many of the next rows that have the same first two hashes."""
_SLICE = 1 << 16


def padded(sketch: array[int]) -> array[int]:
    """Return the sketch padded to ``SKETCH`` numbers, as stored in the file of sketches."""
    return sketch + array("I", [_EMPTY]) * (SKETCH - len(sketch))


def group_keys(keys: array[int], sketches: Path) -> array[int]:
    """Return a 64-bit key for each row, equal for rows that are identical or nearly so.

    ``keys`` come from ``split.group_key``, ``sketches`` is a file with the padded sketch of each row. Chains
    of similar rows are one group. If a group has more than half of all rows, they probably share only a
    common wording, so only its exact duplicates are kept together.
    """
    import numpy as np

    own = np.frombuffer(keys, dtype=np.uint64)
    distinct, first, which = np.unique(own, return_index=True, return_inverse=True)
    rows = np.memmap(sketches, dtype=np.uint32, mode="r").reshape(-1, SKETCH)
    label = np.arange(len(distinct), dtype=np.uint32)
    for mix in _MIXES:
        bucket = _buckets(rows, first, mix)
        order = np.argsort(bucket, kind="stable")
        order = order[: np.searchsorted(bucket[order], np.uint64(_EMPTY) << np.uint64(32))]
        for distance in range(1, _NEIGHBORS + 1):
            for start in range(0, len(order) - distance, _SLICE):
                one = order[start : min(start + _SLICE, len(order) - distance)]
                other = order[start + distance :][: len(one)]
                near = (bucket[one] == bucket[other]) & (label[one] != label[other])
                one, other = one[near], other[near]
                alike = _similarities(rows[first[one]], rows[first[other]]) >= SAME_SIDE_THRESHOLD
                label = _joined(label, one[alike], other[alike])
    group = distinct[label][which]
    common = np.bincount(label[which])
    wording = common[label[which]] * 2 > len(own)
    group = np.where(wording, own, group)
    return array("Q", group.tobytes())


def _buckets(rows: Array, numbers: Array, mix: int) -> Array:
    """Return the first two hashes of each row, in the order that ``mix`` defines, as one number."""
    import numpy as np

    buckets = np.empty(len(numbers), dtype=np.uint64)
    for start in range(0, len(numbers), _SLICE):
        part = rows[numbers[start : start + _SLICE]]
        mixed = np.where(part == _EMPTY, np.uint32(_EMPTY), part * np.uint32(mix))
        two = np.partition(mixed, 1, axis=1)[:, :2].astype(np.uint64)
        buckets[start : start + _SLICE] = two[:, 0] << np.uint64(32) | two[:, 1]
    return buckets


def _similarities(one: Array, other: Array) -> Array:
    """Estimate the similarity of each pair of sketches, as ``_similarity`` does."""
    import numpy as np

    both = np.sort(np.concatenate([one, other], axis=1), axis=1)
    again = np.zeros(both.shape, dtype=bool)
    again[:, 1:] = both[:, 1:] == both[:, :-1]
    again &= both != _EMPTY
    place = np.arange(both.shape[1]) - np.cumsum(again, axis=1)
    size = np.maximum((one != _EMPTY).sum(axis=1), (other != _EMPTY).sum(axis=1))
    shared: Array = (again & (place < size[:, None])).sum(axis=1) / np.maximum(size, 1)
    return shared


def _joined(label: Array, one: Array, other: Array) -> Array:
    """Merge the groups of ``one[i]`` and ``other[i]`` for each i, and return the label of each distinct row:
    the smallest index in its group.
    """
    import numpy as np

    while len(one):
        roots = label[one], label[other]
        low = np.minimum(*roots)
        for root in roots:
            np.minimum.at(label, root, low)
        while not np.array_equal(jumped := label[label], label):
            label = jumped
        differs = label[one] != label[other]
        one, other = one[differs], other[differs]
    return label
