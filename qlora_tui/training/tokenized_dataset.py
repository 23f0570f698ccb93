"""What planning and collating read of tokenized samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TokenizedDataset(Protocol):
    """The interface of a tokenized data set; ``qlora_tui.data.store.Samples`` implements it."""

    def __len__(self) -> int: ...

    def token_ids(self, i: int, /) -> Sequence[int]:
        """Token ids of sample ``i``."""

    def loss_mask(self, i: int, /) -> Sequence[int]:
        """1 for each token in the loss, else 0."""

    def weights(self, i: int, /) -> Sequence[float] | None:
        """Weight of each token in the loss; None where each token in the loss has weight 1."""

    def length(self, i: int, /) -> int:
        """Length of sample ``i`` in tokens."""

    def epoch(self, epoch: int, seed: int, /) -> Sequence[int]:
        """Indices of all samples in the random order of one epoch."""
