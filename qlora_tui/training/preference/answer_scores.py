"""Log-probabilities of whole answers, of a model as it is or as it was before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_tui.data.store import GOOD
from qlora_tui.training.batches import PackedSamples, collate, sum_loss_weights
from qlora_tui.training.eval_mode import frozen_eval
from qlora_tui.training.preference.pairs import SidedDataset
from qlora_tui.training.preference.starting_adapter import StartingAdapter


class AnswerScores(NamedTuple):
    """Log-probabilities of the answers of a micro-batch, in the order of its samples."""

    log_probabilities: Tensor
    """Weighted sum over the tokens of each answer, in nats, fp32 (answers,)."""
    weights: Tensor
    """Sum of the weights of its tokens, fp32 (answers,): their number, where the data sets no weights."""

    @property
    def means(self) -> Tensor:
        """Mean log-probability of a token of each answer, (answers,)."""
        return self.log_probabilities / self.weights.clamp(min=1e-6)


class Comparisons(NamedTuple):
    """What the losses of a step, or of a validation, are weighted by."""

    compared: int
    """Pairs, or rated answers: the divisor of the summed losses."""
    token_share: float
    """``compared`` divided by the trained tokens of good answers: what a token of ORPO's cross-entropy counts
    beside a pair."""


def count_comparisons(answers: Sequence[int], samples: SidedDataset, *, pairs: bool) -> Comparisons:
    """Count the comparisons of some samples; with ``pairs``, two of them are one."""
    compared = len(answers) // 2 if pairs else len(answers)
    good = [(i,) for i in answers if samples.side(i) == GOOD]
    return Comparisons(compared, compared / (sum_loss_weights(good, samples) or 1))


def collate_answers(
    sequences: Sequence[PackedSamples],
    samples: SidedDataset,
    *,
    padding_free: bool,
    pad_id: int,
    multiple: int,
) -> dict[str, Any]:
    """Collate a micro-batch (:func:`qlora_tui.training.batches.collate`), and say where its answers are.

    Returns:
        Its tensors, and lists with an entry for each sample: ``sides``, ``GOOD`` or ``BAD``, and
        ``answer_tokens``, the number of its tokens in the loss.
    """
    batch = collate(sequences, samples, padding_free=padding_free, pad_id=pad_id, multiple=multiple)
    members = [i for sequence in sequences for i in sequence]
    return batch | {
        "sides": [samples.side(i) for i in members],
        "answer_tokens": [sum(samples.loss_mask(i)[1:]) for i in members],
    }


def score_answers(model: Any, batch: dict[str, Any]) -> AnswerScores:
    """Compute the log-probability of each answer of a micro-batch on the model's device.

    Args:
        model: a model, perhaps in wrappers, with :func:`~qlora_tui.training.token_losses.use_token_losses`.
        batch: from :func:`collate_answers`.
    """
    inputs = {k: v for k, v in batch.items() if k not in ("sides", "answer_tokens", "loss_weights")}
    losses: Tensor = model(per_token=True, **inputs).loss
    counts: list[int] = batch["answer_tokens"]
    if not counts:
        nothing = losses.sum()[None][:0]
        return AnswerScores(nothing, nothing.detach())
    if "loss_weights" in batch:
        token_weights = batch["loss_weights"].flatten().index_select(0, batch["loss_positions"] + 1)
        losses = losses * token_weights
        weights = torch.stack([part.sum() for part in torch.split(token_weights, counts)])
    else:
        weights = torch.tensor(counts, dtype=torch.float32, device=losses.device)
    # Split and not scattered: a sum by atomic additions would differ from run to run.
    sums = torch.stack([part.sum() for part in torch.split(losses, counts)])
    return AnswerScores(-sums, weights)


def score_with_reference(
    peft_model: Any, batch: dict[str, Any], starting: StartingAdapter | None = None
) -> Tensor:
    """Log-probability of each answer before training, (answers,), without gradients.

    Before the first step it equals that of the model to the last bit, so that rewards are 0 and not rounding.

    Args:
        peft_model: its base is the reference, with the adapter off.
        starting: the adapter that the run started from, which is then the reference on that base.
    """
    before = peft_model.disable_adapter() if starting is None else starting.in_place(peft_model)
    with before, frozen_eval(peft_model):
        return score_answers(peft_model, batch).log_probabilities
