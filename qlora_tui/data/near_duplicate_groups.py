"""Which rows say nearly the same, so that a split keeps them on one side.

All sketches are looked at together, in an order that their content decides: the groups are the same in
whatever order the rows came. Sketches stay on disk, and every step takes a slice of them: with their pages
that is under two hundred bytes a row. Imports numpy when called: only the trainer prepares data.
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
"""Share of word triples in common from which on two rows belong together. Less than makes a near
duplicate: to keep two more rows on one side costs nothing."""
_EMPTY = 0xFFFFFFFF
"""Fills a sketch up."""
_MIXES = tuple(random.Random(number).getrandbits(32) | 1 for number in range(12))
"""Each puts the hashes in another order. Two rows that share 0.8 of their triples have the same first two
hashes in one of these orders, but for 5 cases in a million."""
_NEIGHBOURS = 8
"""Rows compared with each, of those with the same first two hashes."""
_SLICE = 1 << 16


def padded(sketch: array[int]) -> array[int]:
    """As it lies in the file of sketches: ``SKETCH`` numbers."""
    return sketch + array("I", [_EMPTY]) * (SKETCH - len(sketch))


def group_keys(keys: array[int], sketches: Path) -> array[int]:
    """For each row a key of 64 bits: the same for rows that say the same or nearly so.

    ``keys`` are those of ``split.group_key``, ``sketches`` is a file with the padded sketch of each row.
    Chains of such rows are one group; one of more than half of all rows is rather a common wording,
    and only its exact duplicates are kept together.
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
        for apart in range(1, _NEIGHBOURS + 1):
            for start in range(0, len(order) - apart, _SLICE):
                one = order[start : min(start + _SLICE, len(order) - apart)]
                other = order[start + apart :][: len(one)]
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
    """The first two hashes of each row in the order that ``mix`` makes, as one number."""
    import numpy as np

    buckets = np.empty(len(numbers), dtype=np.uint64)
    for start in range(0, len(numbers), _SLICE):
        part = rows[numbers[start : start + _SLICE]]
        mixed = np.where(part == _EMPTY, np.uint32(_EMPTY), part * np.uint32(mix))
        two = np.partition(mixed, 1, axis=1)[:, :2].astype(np.uint64)
        buckets[start : start + _SLICE] = two[:, 0] << np.uint64(32) | two[:, 1]
    return buckets


def _similarity(one: Array, other: Array) -> Array:
    """What ``near_duplicates`` estimates of two sketches, for each pair of rows."""
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
    """The labels after each pair is put together: of a group the smallest number."""
    import numpy as np

    while len(one):
        roots = label[one], label[other]
        low = np.minimum(*roots)
        for root in roots:
            np.minimum.at(label, root, low)
        while not np.array_equal(jumped := label[label], label):
            label = jumped
        apart = label[one] != label[other]
        one, other = one[apart], other[apart]
    return label
