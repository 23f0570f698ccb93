"""The loss of a preference method on the validation data, and the share of comparisons that are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_tui.data.store import Samples
from qlora_tui.training.batches import on_device, validation_batches
from qlora_tui.training.eval_mode import no_grad_eval
from qlora_tui.training.preference.answer_scores import collate_answers, count_comparisons
from qlora_tui.training.preference.mismatched import MismatchedSamples
from qlora_tui.training.preference.objective import PreferenceObjective, RewardSums
from qlora_tui.training.preference.pairs import SidedDataset
from qlora_tui.training.prepared_run import PreparedRun


class PreferenceValidator:
    """Validates a run's model as often as the recipe says; KTO's reference point is that of all its rows."""

    def __init__(self, prepared: PreparedRun, objective: PreferenceObjective) -> None:
        """``objective``: not that of the trainer, whose sums are of training steps."""
        recipe = prepared.recipe
        self._prepared = prepared
        self._objective = objective
        self._samples: Samples = prepared.data.validation
        self._micro_batch = recipe.training.micro_batch_size
        self._batches = validation_batches(
            self._samples,
            self._micro_batch,
            recipe.data.max_length,
            padding_free=prepared.base.padding_free,
            pairs=recipe.trains_pairs,
        )

    def evaluate(self, model: Any, progress: Callable[[int, int], None]) -> tuple[float, RewardSums]:
        """Mean loss of a pair or rated answer, and the rewards. Each process computes its share.

        Args:
            progress: called with the number of micro-batches done, and of all.
        """
        prepared, objective, samples = self._prepared, self._objective, self._samples
        dist = prepared.dist
        members = [i for batch in self._batches for sequence in batch for i in sequence]
        comparisons = count_comparisons(members, samples, pairs=prepared.recipe.trains_pairs)
        total = 0.0
        if objective.needs_divergence:
            objective.set_divergence(self._divergence(model, members))
        batches = self._batches[dist.rank :: dist.world_size]
        with no_grad_eval(model):
            for done, sequences in enumerate(batches, 1):
                batch = self._collated(sequences, samples)
                total += float(objective.summed_loss(model, model, batch, comparisons.token_share))
                progress(done, len(batches))
        total, *sums = dist.all_reduce_sum((total, *objective.take_sums()))
        return total / (comparisons.compared or 1), RewardSums(*sums)

    def _divergence(self, model: Any, members: list[int]) -> float:
        prepared = self._prepared
        max_length = prepared.recipe.data.max_length
        mismatched = MismatchedSamples(self._samples, members, max_length)
        batches = validation_batches(
            mismatched, self._micro_batch, max_length, padding_free=prepared.base.padding_free
        )
        parts = [
            self._objective.divergence(model, self._collated(sequences, mismatched))
            for sequences in batches[prepared.dist.rank :: prepared.dist.world_size]
        ]
        total, count = prepared.dist.all_reduce_sum(
            (sum(part[0] for part in parts), float(sum(part[1] for part in parts)))
        )
        return total / (count or 1)

    def _collated(self, sequences: Any, samples: SidedDataset) -> dict[str, Any]:
        prepared = self._prepared
        batch = collate_answers(
            sequences,
            samples,
            padding_free=prepared.base.padding_free,
            pad_id=prepared.pad_id,
            multiple=prepared.device.row_multiple,
        )
        return on_device(batch, prepared.device.torch_device)
