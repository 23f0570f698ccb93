"""Tokenized samples in memory, as a data set. This module does not load torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qlora_tui.data.store import GOOD


class Sample(NamedTuple):
    """One tokenized sample."""

    token_ids: Sequence[int]
    loss_mask: Sequence[int]
    """1 for each token in the loss, else 0."""
    weights: Sequence[float] | None = None
    """Loss weight of each token; None if each token in the loss has weight 1."""
    side: int = GOOD
    """``GOOD`` or ``BAD``, the side of the sample in a preference."""


class SampleList:
    """A data set of samples that are in memory, or that a sequence creates on access. Every epoch has the
    same order.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def token_ids(self, i: int, /) -> Sequence[int]:
        """Return the token ids of sample ``i``."""
        return self._samples[i].token_ids

    def loss_mask(self, i: int, /) -> Sequence[int]:
        """For each token of sample ``i``, return 1 if it is in the loss, else 0."""
        return self._samples[i].loss_mask

    def weights(self, i: int, /) -> Sequence[float] | None:
        """Return the weight of each token; None if each token in the loss has weight 1."""
        return self._samples[i].weights

    def length(self, i: int, /) -> int:
        """Return the length of sample ``i`` in tokens."""
        return len(self.token_ids(i))

    def epoch(self, epoch: int, seed: int, /) -> Sequence[int]:
        """Return the indices of all samples, in order."""
        return range(len(self))

    def side(self, i: int, /) -> int:
        """Return ``GOOD`` or ``BAD``, the side of sample ``i``."""
        return self._samples[i].side

    def of_side(self, side: int, /) -> SampleList:
        """Return the samples of one side, in order."""
        return SampleList([sample for sample in self._samples if sample.side == side])

    @property
    def tokens(self) -> int:
        """Number of tokens of all samples."""
        return sum(map(self.length, range(len(self))))
