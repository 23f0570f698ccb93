"""Loss of each trained token of each training sample, with a model as it is; without gradients."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_tui.training.batches import collate, on_device, pack
from qlora_tui.training.chunked_loss import find_head
from qlora_tui.training.eval_mode import no_grad_eval
from qlora_tui.training.forgetting.answer_logits import RowShape
from qlora_tui.training.packed_attention import segment_mask
from qlora_tui.training.token_losses import token_losses as each_token_loss
from qlora_tui.training.tokenized_dataset import TokenizedDataset


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


def token_losses(
    model: Any,
    samples: TokenizedDataset,
    shape: RowShape,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, ...]]:
    """Cross-entropy of each trained token of each sample, in nats.

    The first token of a sample has none, since it is predicted from nothing; it is left out.

    Args:
        model: a peft model, with its adapter enabled or disabled.
        progress: called with the number of samples done, and of all.
    """
    numbers = range(len(samples))
    rows = (
        pack(numbers, [samples.length(i) for i in numbers], shape.max_length)
        if shape.packed
        else [(i,) for i in numbers]
    )
    losses: list[tuple[float, ...]] = [()] * len(samples)
    done = 0
    with no_grad_eval(model):
        for row in rows:
            batch = collate(
                [row], samples, padding_free=shape.packed, pad_id=shape.pad_id, multiple=shape.multiple
            )
            values = _row_losses(model, on_device(batch, device)).tolist()
            for i in row:
                count = sum(samples.loss_mask(i)[1:])
                losses[i], values = tuple(values[:count]), values[count:]
            done += len(row)
            progress(done, len(samples))
    return losses


def _row_losses(model: Any, batch: dict[str, Any]) -> Tensor:
    """Loss of each trained token of one row, (tokens,), fp32."""
    bare = model.get_base_model()
    positions: Tensor = batch["loss_positions"]
    targets = batch["labels"].flatten().index_select(0, positions + 1)
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    if "segments" in batch:
        inputs |= {
            "position_ids": batch["position_ids"],
            "attention_mask": segment_mask(batch["segments"]),
        }
    head = find_head(bare)
    if isinstance(head, str):
        inputs.pop("attention_mask", None)
        more = {"segments": batch["segments"]} if "segments" in batch else {}
        logits = bare(**inputs, **more, logits_to_keep=positions).logits[0]
        return nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    states = bare.get_decoder()(**inputs)[0].flatten(0, 1).index_select(0, positions)
    return each_token_loss(states, targets, head)
