"""Validation: loss, exact matches of short answers, rewards of a preference method, and the effect of
training on the loss.

Greedy search reproduces a short answer if and only if each of its tokens is the most likely one after the
tokens before it. The validation pass already computes hidden states at all these positions, so nothing is
generated: every validation sample is counted, for the cost of one projection of its answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_tui.data.store import GOOD
from qlora_tui.runs.events import ValidationCompared
from qlora_tui.runs.task_metrics.task_evaluation import LossChange
from qlora_tui.training.adapter import load_initial_adapter
from qlora_tui.training.batches import (
    collate,
    collate_answers,
    count_comparisons,
    mismatched_batches,
    on_device,
    sum_loss_weights,
    validation_batches,
)
from qlora_tui.training.loss import IGNORED
from qlora_tui.training.preferences import PreferenceObjective, RewardSums
from qlora_tui.training.run import Run
from qlora_tui.training.scoring import no_grad_eval, token_losses

SHORT_TOKENS = 16
"""A sample's answer counts as short if at most this many tokens, turn ends included, are in the loss."""
_CHUNK_ROWS = 256
"""Number of rows of logits in memory at a time."""
_MAX_ROWS = 128
"""Maximum number of rows that are compared before and after training."""


class ValidationResult(NamedTuple):
    """The results of one validation."""

    loss: float
    """Mean over the tokens in the loss, or over the comparisons of a preference method."""
    accuracy: float | None = None
    """Share of exact answers, if all answers are short; otherwise None."""
    rewards: RewardSums = RewardSums()
    """Rewards of a preference method; empty sums for other runs."""


class Evaluator:
    """Validates a run's model on demand. Each process computes its share of the batches."""

    def __init__(self, run: Run) -> None:
        samples, recipe = run.data.validation, run.recipe
        self._run = run
        self._batches = validation_batches(
            samples, recipe.training.micro_batch_size, run.shape, pairs=recipe.trains_pairs
        )
        self._objective = PreferenceObjective.of(recipe, run.starting_adapter)
        """Separate from the trainer's objective, which sums over training steps."""
        short = [sum(samples.loss_mask(i)) <= SHORT_TOKENS for i in range(len(samples))]
        self._short_answers_end = frozenset(run.tokenizer.turn_end_ids) if short and all(short) else None

    @property
    def has_validation_data(self) -> bool:
        """Whether the run has validation data."""
        return bool(self._batches)

    def evaluate(self) -> ValidationResult:
        """Validate the model in its current state. Raises StepAbandoned if the run is to stop at once."""
        run = self._run
        if self._objective is not None:
            return self._evaluate_preferences(self._objective)
        total, loss_weight_sum, exact, answered = 0.0, 0.0, 0, 0
        samples, batches = run.data.validation, self._batches[self._mine]
        with no_grad_eval(run.model), last_hidden_states(run.model) as hidden:
            for done, sequences in enumerate(batches, 1):
                if weight_sum := sum_loss_weights(sequences, samples):
                    batch = collate(sequences, samples, run.shape)
                    tensors = on_device(batch, run.device.torch_device)
                    # With 1 the model returns the summed loss, which is then divided by the loss weights of
                    # all batches.
                    output = run.model(**tensors, num_items_in_batch=1)
                    total += float(output.loss)
                    loss_weight_sum += weight_sum
                    if self._short_answers_end is not None:
                        labels = tensors["labels"]
                        wanted = labels[:, 1:] != IGNORED
                        predicted = argmax_tokens(run.model, output.logits, hidden[0], wanted)
                        segments = batch.get("segments")
                        right, answers = exact_answers(predicted, labels, segments, self._short_answers_end)
                        exact, answered = exact + right, answered + answers
                self._report_progress(done, len(batches))
        sums = run.dist.all_reduce_sum((total, loss_weight_sum, exact, answered))
        total, loss_weight_sum, right_share, answer_count = sums
        accuracy = right_share / answer_count if answer_count else None
        return ValidationResult(total / (loss_weight_sum or 1), accuracy)

    def _evaluate_preferences(self, objective: PreferenceObjective) -> ValidationResult:
        """Return the mean loss of a pair or rated answer, and the rewards.

        KTO's reference point is computed from all rows.
        """
        run, samples, shape, where = self._run, self._run.data.validation, self._run.shape, self._mine
        members = [i for batch in self._batches for sequence in batch for i in sequence]
        comparisons = count_comparisons(members, samples, pairs=run.recipe.trains_pairs)
        device = run.device.torch_device
        if objective.needs_divergence:
            size = run.recipe.training.micro_batch_size
            mismatched = mismatched_batches(samples, members, size, shape)[where]
            parts = [objective.divergence(run.model, on_device(batch, device)) for batch in mismatched]
            moved, count = run.dist.all_reduce_sum(
                (sum(part[0] for part in parts), float(sum(part[1] for part in parts)))
            )
            objective.set_divergence(moved / (count or 1))
        total, batches = 0.0, self._batches[where]
        with no_grad_eval(run.model):
            for done, sequences in enumerate(batches, 1):
                batch = on_device(collate_answers(sequences, samples, shape), device)
                total += float(objective.summed_loss(run.model, run.model, batch, comparisons.token_share))
                self._report_progress(done, len(batches))
        total, *sums = run.dist.all_reduce_sum((total, *objective.take_sums()))
        return ValidationResult(total / (comparisons.compared or 1), rewards=RewardSums(*sums))

    @property
    def _mine(self) -> slice:
        """Return this process's share of the batches."""
        return slice(self._run.dist.rank, None, self._run.dist.world_size)

    def _report_progress(self, done: int, total: int) -> None:
        self._run.reporter.progress("evaluating", done, total)
        self._run.between_batches()


@contextmanager
def last_hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """Collect the decoder's output in the last forward of a peft model: a list with one tensor."""
    hidden: list[Tensor] = []

    def save(module: Any, args: Any, output: Any) -> None:
        hidden[:] = [output[0]]

    hook = model.get_base_model().get_decoder().register_forward_hook(save)
    try:
        yield hidden
    finally:
        hook.remove()


def argmax_tokens(model: Any, logits: Tensor | None, hidden: Tensor, wanted: Tensor) -> Tensor:
    """Return the most likely token at each position that ``wanted`` selects.

    Scaling and capping of logits is skipped, because it does not change which one is largest.

    Args:
        logits: (batch, tokens, vocabulary); None if the loss was computed in chunks, without whole logits.
        hidden: (batch, tokens, hidden), the input of the head.
        wanted: (batch, tokens - 1), bool.

    Returns:
        (positions,), token ids.
    """
    if logits is not None:
        return logits[:, :-1][wanted].argmax(-1)
    head = model.get_base_model().get_output_embeddings()
    # If rows of the head are trained, peft copies the whole matrix at each access to its weight.
    weight = getattr(head, "original_module", head).weight
    states = hidden[:, :-1][wanted].to(weight.dtype)
    return torch.cat([head(chunk).argmax(-1) for chunk in torch.split(states, _CHUNK_ROWS)])


def exact_answers(
    predicted: Tensor, labels: Tensor, segments: Sequence[int] | None, turn_ends: frozenset[int]
) -> tuple[int, int]:
    """Return how many samples were answered exactly, and how many have an answer.

    Tokens that a chat template writes after the end of a turn are not part of an answer.

    Args:
        predicted: (positions,), one for each label in ``labels[:, 1:]`` that is not ignored.
        labels: (batch, tokens).
        segments: lengths of the samples packed into the one sequence; None if each sequence is a sample.
    """
    wanted = labels[:, 1:] != IGNORED
    wrong = torch.zeros_like(labels, dtype=torch.bool)
    wrong[:, 1:][wanted] = predicted != labels[:, 1:][wanted]
    answered = labels != IGNORED
    for end in turn_ends:
        wrong[:, 1:] &= labels[:, :-1] != end
    if segments is None:
        parts = list(zip(wrong, answered, strict=True))
    else:
        lengths = list(segments)
        parts = list(zip(torch.split(wrong[0], lengths), torch.split(answered[0], lengths), strict=True))
    answers = [part for part in parts if part[1].any()]
    return sum(not bool(part[0].any()) for part in answers), len(answers)


def compare_validation(run: Run) -> LossChange | None:
    """Report the loss of up to 128 validation rows before and after training; for pairs, of the chosen side.

    The model before training is the base, with the starting adapter if the run has one. Methods that do not
    make answers more likely are skipped. The adapter is already on the disk, so an error, such as too little
    memory, loses only the comparison and not the run. ``run.model`` must have the final adapter; afterwards
    it may have the starting adapter.

    Returns:
        The reported change; None if nothing was reported.
    """
    samples = run.data.validation.of_side(GOOD).spread(_MAX_ROWS)
    reporter = run.reporter
    if not len(samples) or not run.recipe.learns_answers:
        return None
    reporter.phase("evaluating", "validation rows, as before training and now")

    def losses(passes_done: int) -> list[tuple[float, ...]]:
        return token_losses(
            run.model,
            samples,
            run.shape,
            run.device.torch_device,
            lambda done, total: reporter.progress("evaluating", passes_done * total + done, 2 * total),
        )

    try:
        after = losses(0)
        with _as_before_training(run):
            before = losses(1)
    except Exception as error:
        reporter.log(f"the validation rows were not compared: {type(error).__name__}: {error}")
        return None
    change = LossChange.of(
        [sum(row) for row in before], [sum(row) for row in after], [len(row) for row in after]
    )
    reporter.emit(
        ValidationCompared(
            rows=change.rows,
            before=change.before,
            after=change.after,
            low=change.interval.low if change.interval else None,
            high=change.interval.high if change.interval else None,
        )
    )
    return change


@contextmanager
def _as_before_training(run: Run) -> Iterator[None]:
    """Turn the adapter off in this context, or replace it permanently with the starting adapter."""
    lora = run.recipe.lora
    if lora.init_from:
        load_initial_adapter(run.model, lora, run.files.architecture)
        yield
    else:
        with run.model.disable_adapter():
            yield
