"""Loss of each trained token of each training sample, with a model as it is; without gradients."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from qlora_tui.training.batches import TokenizedDataset


class OtherPrompts:
    """Each sample's answers after prompts of other samples; a ``TokenizedDataset``.

    A prompt is a stretch of tokens outside the loss, an answer the stretch in the loss after it. The first
    prompt, with system text and template, is that of the next sample. Later ones are those of the next
    sample with several turns; where no other sample has any, another later prompt of the same one::

        sample 0   system, user a, [answer a], user b, [answer b]
        sample 1   system, user c, [answer c], user d, [answer d]
        gives      system, user c, [answer a], user d, [answer b]
    """

    def __init__(self, samples: TokenizedDataset, max_length: int) -> None:
        """``max_length``: tokens of a sample; what is longer loses the beginning of its first prompt."""
        self._samples = samples
        self._max_length = max_length
        self._turns = [_turn_bounds(samples.loss_mask(i)) for i in range(len(samples))]
        self._with_several = [i for i, turns in enumerate(self._turns) if len(turns) > 1]

    def __len__(self) -> int:
        return len(self._samples)

    def token_ids(self, i: int, /) -> Sequence[int]:
        """Token ids of sample ``i``."""
        return self._swapped(i)[0]

    def loss_mask(self, i: int, /) -> Sequence[int]:
        """1 for each token in the loss, else 0."""
        return self._swapped(i)[1]

    def weights(self, i: int, /) -> None:
        """None: each token in the loss counts as one."""

    def length(self, i: int, /) -> int:
        """Length of sample ``i`` in tokens."""
        return len(self.token_ids(i))

    def epoch(self, epoch: int, seed: int, /) -> Sequence[int]:
        """Indices of all samples, in order."""
        return array("I", range(len(self)))

    def _swapped(self, i: int) -> tuple[list[int], list[int]]:
        """Token ids and loss mask of a sample with other prompts."""
        own = list(self._samples.token_ids(i))
        ids: list[int] = []
        mask: list[int] = []
        for number, turn in enumerate(self._turns[i]):
            prompt, answer = self._other_prompt(i, number), own[turn.answer_start : turn.end]
            ids += [*prompt, *answer]
            mask += [0] * len(prompt) + [1] * len(answer)
        first = mask.index(1) if 1 in mask else 0
        cut = min(first, max(0, len(ids) - self._max_length))
        return ids[cut:][: self._max_length], mask[cut:][: self._max_length]

    def _other_prompt(self, i: int, number: int) -> list[int]:
        """What stands in for prompt ``number`` of sample ``i``."""
        if number == 0:
            other = (i + 1) % len(self)
            turns = self._turns[other]
            end = turns[0].answer_start if turns else self._samples.length(other)
            return list(self._samples.token_ids(other))[:end]
        donors = self._with_several
        other = donors[bisect_right(donors, i) % len(donors)]
        turns = self._turns[other]
        later = len(turns) - 1
        # Of the same sample, the prompt after this one.
        turn = turns[1 + (number - (other != i)) % later]
        return list(self._samples.token_ids(other))[turn.start : turn.answer_start]


class _TurnBounds(NamedTuple):
    """Places of a prompt and its answer in a sample."""

    start: int
    answer_start: int
    end: int


def _turn_bounds(loss_mask: Sequence[int]) -> list[_TurnBounds]:
    """Each answer in the loss with the prompt before it; what follows the last answer belongs to none."""
    bounds: list[_TurnBounds] = []
    start, place = 0, 0
    for in_loss, stretch in groupby(loss_mask, key=bool):
        length = len(list(stretch))
        if in_loss:
            bounds.append(_TurnBounds(start, place, place + length))
            start = place + length
        place += length
    return bounds
