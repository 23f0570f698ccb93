"""Selection of validation rows: seeded, the same share of each source, duplicates kept together.

Near duplicates count as duplicates: see ``near_duplicate_groups``.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from qlora_tui.data.conversation import Conversation
from qlora_tui.data.near_duplicate_groups import group_keys, padded

_encode = msgspec.json.Encoder().encode


def group_key(conversation: Conversation, seed: int) -> int:
    """Return a 64-bit key, equal for rows that differ only in case and white space.

    The seed is mixed in, so that the order of the keys is the random order of the split.
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
        """``folder`` holds the sketches of the rows until the split is decided."""
        self._fraction = fraction
        self._keys = array("Q")
        self._sources = array("H")
        self._path = folder / "sketches.u32"
        self._sketches = self._path.open("wb", buffering=1 << 20)

    @property
    def wanted(self) -> bool:
        """Return whether any rows are held back for validation, so that sketches are needed."""
        return self._fraction > 0

    def add(self, source: int, key: int, sketch: array[int]) -> None:
        """Add one row; ``key`` is its ``group_key``, ``sketch`` comes from ``near_duplicates``."""
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
    """Select the validation groups: about ``fraction`` of the rows of each source, and no more.

    ``groups`` and ``sources`` have one entry per row; the group numbers define their random order. A source
    whose groups are all too large gives its smallest one if it has others. At least one group is held back
    where there are two, and at least one is left to train on.
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
    """Yield each group, ascending, with its number of rows by source."""
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
