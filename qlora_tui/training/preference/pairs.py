"""Pairs of samples, a chosen and a rejected answer to one prompt, which share a sequence.

The store holds the chosen side of pair ``k`` as sample ``2k`` and the rejected side as ``2k + 1``::

    pairs       0     1     2
    samples    0 1   2 3   4 5
    sequences  (0, 1, 4, 5) and (2, 3): pairs 0 and 2 packed together
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from qlora_tui.data.store import GOOD
from qlora_tui.training.tokenized_dataset import TokenizedDataset


class SidedDataset(TokenizedDataset, Protocol):
    """Tokenized samples that are good or bad answers; ``qlora_tui.data.store.Samples`` is one."""

    def side(self, i: int, /) -> int:
        """``GOOD`` or ``BAD`` of :mod:`qlora_tui.data.store`."""

    def of_side(self, side: int, /) -> SidedDataset:
        """The samples of one side, in order."""


class Pairs:
    """The pairs of a data set, numbered from 0."""

    def __init__(self, samples: SidedDataset) -> None:
        self._samples = samples
        self._chosen = samples.of_side(GOOD)

    def __len__(self) -> int:
        return len(self._samples) // 2

    def length(self, pair: int) -> int:
        """Tokens of both sides."""
        return sum(self._samples.length(i) for i in members((pair,)))

    def epoch(self, epoch: int, seed: int) -> Sequence[int]:
        """The pairs in the random order of one epoch."""
        return self._chosen.epoch(epoch, seed)


def members(pairs: Sequence[int]) -> tuple[int, ...]:
    """The samples of these pairs, the chosen side of each first."""
    return tuple(i for pair in pairs for i in (2 * pair, 2 * pair + 1))
