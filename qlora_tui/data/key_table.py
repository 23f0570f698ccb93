"""A hash table of 64-bit keys in flat arrays, which finds duplicates among millions of rows.

Measured at commit 7720e8a0, two cores: a million rows take 40 MiB (5 million: 264) and 0.7 µs each; in a
dict, 116 MiB (543) and 0.2 µs. The half microsecond is little next to the 200 that a row takes to
tokenize, and a data set must be made within a gigabyte. numpy arrays take as much memory as
these, twice the time, and an import that the Data screen does without. Used by ``dataset_scan``.
"""

from __future__ import annotations

from array import array

_START_SLOTS = 1 << 10


class KeyTable:
    """Maps each key to the first row that had it."""

    def __init__(self) -> None:
        self._keys = array("Q", bytes(8 * _START_SLOTS))
        self._rows = array("Q", bytes(8 * _START_SLOTS))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def first(self, key: int, row: int) -> int | None:
        """Return the earlier row with ``key``; None if there is none, and ``row`` is then stored."""
        slot = self._slot(key)
        if self._rows[slot]:
            return self._rows[slot] - 1
        self._keys[slot], self._rows[slot] = key, row + 1
        self._count += 1
        if 2 * self._count > len(self._keys):
            self._grow()
        return None

    def get(self, key: int) -> int | None:
        """Return the row stored for ``key``, or None."""
        slot = self._slot(key)
        return self._rows[slot] - 1 if self._rows[slot] else None

    def _slot(self, key: int) -> int:
        """Return the slot where ``key`` is, or would be."""
        mask = len(self._keys) - 1
        slot = key & mask
        while self._rows[slot] and self._keys[slot] != key:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        keys, rows = self._keys, self._rows
        self._keys, self._rows = array("Q", bytes(16 * len(keys))), array("Q", bytes(16 * len(keys)))
        for key, row in zip(keys, rows, strict=True):
            if row:
                slot = self._slot(key)
                self._keys[slot], self._rows[slot] = key, row
