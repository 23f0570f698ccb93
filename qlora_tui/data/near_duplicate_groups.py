"""Groups of nearly identical rows, so that a split keeps each on one side.

All sketches are compared in an order given by their content, so the groups do not depend on the order of the
rows. Sketches stay on disk, and every step reads a slice of them: under two hundred bytes per row, mapped
pages included. Imports numpy when called: only the trainer prepares data.
"""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from qlora_tui.data.near_duplicates import SKETCH

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

SAME_SIDE_THRESHOLD = 0.6
"""Share of common word triples from which two rows are kept on one side. Lower than for a near duplicate,
because keeping two more rows on one side costs nothing."""
_EMPTY = 0xFFFFFFFF
"""Padding value of a sketch."""
_MIXES = tuple(random.Random(number).getrandbits(32) | 1 for number in range(12))
"""Multipliers that each put the hashes in another order. Two rows that share 0.8 of their triples have the
same first two hashes in one of these orders, except for 5 cases in a million."""
_NEIGHBORS = 8
"""Rows that each row is compared with, among those with the same first two hashes."""
_SLICE = 1 << 16


def padded(sketch: array[int]) -> array[int]:
    """Return the sketch padded to ``SKETCH`` numbers, as stored in the file of sketches."""
    return sketch + array("I", [_EMPTY]) * (SKETCH - len(sketch))


def group_keys(keys: array[int], sketches: Path) -> array[int]:
    """Return a 64-bit key for each row, equal for rows that are identical or nearly so.

    ``keys`` come from ``split.group_key``, ``sketches`` is a file with the padded sketch of each row. Chains
    of such rows are one group. A group of more than half of all rows is treated as a common wording, and only
    its exact duplicates are kept together.
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
                alike = _similarity(rows[first[one]], rows[first[other]]) >= SAME_SIDE_THRESHOLD
                label = _joined(label, one[alike], other[alike])
    group = distinct[label][which]
    common = np.bincount(label[which])
    wording = common[label[which]] * 2 > len(own)
    group = np.where(wording, own, group)
    return array("Q", group.tobytes())


def _buckets(rows: Array, numbers: Array, mix: int) -> Array:
    """Return the first two hashes of each row in the order that ``mix`` makes, as one number."""
    import numpy as np

    buckets = np.empty(len(numbers), dtype=np.uint64)
    for start in range(0, len(numbers), _SLICE):
        part = rows[numbers[start : start + _SLICE]]
        mixed = np.where(part == _EMPTY, np.uint32(_EMPTY), part * np.uint32(mix))
        two = np.partition(mixed, 1, axis=1)[:, :2].astype(np.uint64)
        buckets[start : start + _SLICE] = two[:, 0] << np.uint64(32) | two[:, 1]
    return buckets


def _similarity(one: Array, other: Array) -> Array:
    """Estimate the similarity of two sketches for each pair of rows, as ``near_duplicates`` does."""
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
    """Return the labels after merging each pair: the smallest number of a group."""
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
