"""The optimizer steps of a preference run: micro-batches of whole pairs, and KTO's mismatched answers."""

from __future__ import annotations

from typing import Any, cast

from qlora_tui.training.batches import count_tokens, validation_batches
from qlora_tui.training.preference.answer_scores import collate_answers, count_comparisons
from qlora_tui.training.preference.mismatched import MismatchedSamples
from qlora_tui.training.preference.pairs import SidedDataset
from qlora_tui.training.prepared_run import PreparedRun
from qlora_tui.training.step_dataset import StepData, StepDataset


class PreferenceSteps(StepDataset):
    """The step plan of a preference run as a data set.

    ``loss_weight_sum`` of a step is the number of its pairs, or rated answers.
    """

    def __init__(self, prepared: PreparedRun) -> None:
        recipe = prepared.recipe
        super().__init__(
            prepared.step_plan,
            prepared.samples,
            micro_batch=recipe.training.micro_batch_size,
            padding_free=prepared.base.padding_free,
            pad_id=prepared.pad_id,
            multiple=prepared.device.row_multiple,
            rank=prepared.dist.rank,
            world_size=prepared.dist.world_size,
        )
        self._sided = cast("SidedDataset", prepared.samples)
        self._pairs = recipe.trains_pairs
        self._max_length = recipe.data.max_length

    def __getitem__(self, n: int) -> StepData:
        sequences = self.step_plan.steps[n].sequences
        members = [i for sequence in sequences for i in sequence]
        comparisons = count_comparisons(members, self._sided, pairs=self._pairs)
        return StepData(
            micro_batches=self._micro_batches(sequences),
            loss_weight_sum=comparisons.compared,
            tokens=count_tokens(sequences, self._sided),
            token_share=comparisons.token_share,
            mismatched=[] if self._pairs else self._mismatched(members),
        )

    def collate(self, sequences: Any) -> dict[str, Any]:
        """Collate the sequences of one micro-batch; see :func:`.answer_scores.collate_answers`."""
        return self._collated(sequences, self._sided)

    def _mismatched(self, members: list[int]) -> list[dict[str, Any]]:
        """This process's share of the mismatched answers of a step; none of a single sample."""
        if len(members) < 2:
            return []
        samples = MismatchedSamples(self._sided, members, self._max_length)
        batches = validation_batches(
            samples, self._micro_batch, self._max_length, padding_free=self._padding_free
        )
        return [self._collated(b, samples) for b in batches[self._rank :: self._world_size]]

    def _collated(self, sequences: Any, samples: SidedDataset) -> dict[str, Any]:
        return collate_answers(
            sequences,
            samples,
            padding_free=self._padding_free,
            pad_id=self._pad_id,
            multiple=self._multiple,
        )
