"""The step plan as a data set whose items are whole optimizer steps, already split into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

from torch.utils.data import Dataset

from qlora_tui.training.batches import (
    PackedSamples,
    StepPlan,
    collate,
    count_tokens,
    mask_all_labels,
    micro_batches,
    sum_loss_weights,
)
from qlora_tui.training.tokenized_dataset import TokenizedDataset


class StepData(TypedDict):
    """The data of one optimizer step, for one process."""

    micro_batches: list[dict[str, Any]]
    loss_weight_sum: float
    """Sum of the loss weights of the whole step, over all processes: the divisor of the summed loss."""
    tokens: int
    """Real tokens of the whole step, over all processes."""
    token_share: NotRequired[float]
    """Of a preference method: its comparisons divided by the trained tokens of good answers."""
    mismatched: NotRequired[list[dict[str, Any]]]
    """Of KTO: micro-batches of answers after other prompts, for this process."""


class StepDataset(Dataset[StepData]):
    """The step plan as a data set: item ``n`` is step ``n + 1``, collated."""

    def __init__(
        self,
        step_plan: StepPlan,
        samples: TokenizedDataset,
        *,
        micro_batch: int,
        padding_free: bool,
        pad_id: int,
        multiple: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.step_plan = step_plan
        self._samples = samples
        self._micro_batch = micro_batch
        self._padding_free = padding_free
        self._pad_id = pad_id
        self._multiple = multiple
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        return len(self.step_plan.steps)

    def __getitem__(self, n: int) -> StepData:
        sequences = self.step_plan.steps[n].sequences
        return StepData(
            micro_batches=self._micro_batches(sequences),
            loss_weight_sum=sum_loss_weights(sequences, self._samples),
            tokens=count_tokens(sequences, self._samples),
        )

    def _micro_batches(self, sequences: Sequence[PackedSamples]) -> list[dict[str, Any]]:
        """Collate this process's share of the micro-batches of a step."""
        groups = micro_batches(sequences, self._micro_batch)
        batches = [self.collate(group) for group in groups[self._rank :: self._world_size]]
        # Every process must run the same number of backward passes, in which DDP reduces the gradients.
        for _ in range(len(batches), math.ceil(len(groups) / self._world_size)):
            batches.append(mask_all_labels(self.collate(groups[0])))
        return batches

    def collate(self, sequences: Any) -> dict[str, Any]:
        """Collate the sequences of one micro-batch; see :func:`qlora_tui.training.batches.collate`."""
        return collate(
            sequences,
            self._samples,
            padding_free=self._padding_free,
            pad_id=self._pad_id,
            multiple=self._multiple,
        )
