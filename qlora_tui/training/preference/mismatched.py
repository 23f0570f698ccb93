"""Each answer after the prompt of another sample, from which KTO estimates its reference point.

The divergence of the model from its base is estimated on answers that do not belong to their prompts (KTO's
paper, section 4.1): sample ``k`` here is the prompt of ``order[k]`` with the answer of ``order[k - 1]``, so
that the answers of a step are used once each.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_tui.data.store import GOOD
from qlora_tui.training.preference.pairs import SidedDataset


class MismatchedSamples:
    """A ``SidedDataset``, in which an answer begins at the first trained token."""

    def __init__(self, samples: SidedDataset, order: Sequence[int], max_length: int) -> None:
        """``max_length``: tokens of a sample; a longer prompt loses its beginning."""
        self._samples = samples
        self._order = tuple(order)
        self._max_length = max_length

    def __len__(self) -> int:
        return len(self._order)

    def token_ids(self, i: int, /) -> Sequence[int]:
        """Token ids of sample ``i``."""
        answer = self._answer(i)
        prompt = list(self._samples.token_ids(self._order[i]))[: self._prompt_tokens(self._order[i])]
        return [*prompt[max(0, len(prompt) + len(answer) - self._max_length) :], *answer]

    def loss_mask(self, i: int, /) -> Sequence[int]:
        """1 for each token in the loss, else 0."""
        before = self._order[i - 1]
        mask = list(self._samples.loss_mask(before))[self._prompt_tokens(before) :]
        return [0] * (self.length(i) - len(mask)) + mask

    def weights(self, i: int, /) -> None:
        """None: each token in the loss counts as one."""

    def length(self, i: int, /) -> int:
        """Length of sample ``i`` in tokens."""
        return min(self._max_length, self._prompt_tokens(self._order[i]) + len(self._answer(i)))

    def epoch(self, epoch: int, seed: int, /) -> Sequence[int]:
        """All samples in order."""
        return range(len(self))

    def side(self, i: int, /) -> int:
        """``GOOD`` for all: they are only scored."""
        return GOOD

    def of_side(self, side: int, /) -> MismatchedSamples:
        """These samples: all are of one side."""
        return self

    def _answer(self, i: int) -> list[int]:
        before = self._order[i - 1]
        return list(self._samples.token_ids(before))[self._prompt_tokens(before) :]

    def _prompt_tokens(self, sample: int) -> int:
        return list(self._samples.loss_mask(sample)).index(1)
