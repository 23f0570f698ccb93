"""Validation loss, exact matches where answers are short, and answers to the recipe's sample prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from qlora_tui.data.conversation import Message
from qlora_tui.data.render import prompt_ids
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.schema import Thinking
from qlora_tui.training.accuracy import (
    argmax_tokens,
    exact_answers,
    has_short_answers,
    last_hidden_states,
)
from qlora_tui.training.batches import PackedSamples, collate, on_device, sum_loss_weights, validation_batches
from qlora_tui.training.chunked_loss import IGNORED
from qlora_tui.training.eval_mode import no_grad_eval
from qlora_tui.training.forgetting.greedy_answers import MOST_LIKELY
from qlora_tui.training.preference.objective import PreferenceObjective, RewardSums
from qlora_tui.training.preference.preference_validation import PreferenceValidator
from qlora_tui.training.prepared_run import PreparedRun
from qlora_tui.training.tokenized_dataset import TokenizedDataset

ANSWER_TOKENS = 96
"""Largest number of tokens of a sampled answer."""


class ValidationSums(NamedTuple):
    """Sums over validation batches, which can be added over processes."""

    loss: float
    """Weighted sum of the losses, in fp32."""
    loss_weight_sum: float
    """Sum of the loss weights: the divisor of the mean loss."""
    exact: int = 0
    """Samples answered exactly by greedy search."""
    answered: int = 0
    """Samples with a short answer."""


class ValidationResult(NamedTuple):
    """What one validation measured."""

    loss: float
    """Mean over the tokens in the loss, or over the comparisons of a preference method."""
    accuracy: float | None = None
    """Share of exact answers, where all are short."""
    rewards: RewardSums = RewardSums()
    """Of a preference method; otherwise of nothing."""


class Evaluator:
    """Evaluates a run's model and samples from it, as often as the recipe says."""

    def __init__(self, prepared: PreparedRun, model: Any) -> None:
        samples = prepared.data.validation
        self._prepared = prepared
        self._model = model
        self._batches = validation_batches(
            samples,
            prepared.recipe.training.micro_batch_size,
            prepared.recipe.data.max_length,
            padding_free=prepared.base.padding_free,
        )
        objective = PreferenceObjective.of(prepared.recipe, prepared.starting_adapter)
        self._preferences = None if objective is None else PreferenceValidator(prepared, objective)
        turn_ends = frozenset(prepared.tokenizer.turn_end_ids)
        self._short_answers_end = turn_ends if has_short_answers(samples) else None

    @property
    def has_validation_data(self) -> bool:
        """Whether the run has validation data."""
        return bool(self._batches)

    def evaluate(self) -> ValidationResult:
        """Validate; each process of the run computes its share of the batches."""
        if self._preferences is not None:
            return self._evaluate_preferences(self._preferences)
        prepared = self._prepared
        dist = prepared.dist
        local_sums = evaluate(
            self._model,
            prepared.data.validation,
            self._batches[dist.rank :: dist.world_size],
            padding_free=prepared.base.padding_free,
            pad_id=prepared.pad_id,
            multiple=prepared.device.row_multiple,
            device=prepared.device.torch_device,
            progress=self._report_progress,
            short_answers_end=self._short_answers_end,
        )
        total, loss_weight_sum, exact, answered = dist.all_reduce_sum(local_sums)
        return ValidationResult(total / (loss_weight_sum or 1), exact / answered if answered else None)

    def _evaluate_preferences(self, validator: PreferenceValidator) -> ValidationResult:
        loss, rewards = validator.evaluate(self._model, self._report_progress)
        return ValidationResult(loss, rewards=rewards)

    def _report_progress(self, done: int, total: int) -> None:
        self._prepared.reporter.progress("evaluating", done, total)
        self._prepared.requests.raise_if_stop_now()

    def sample(self) -> Iterator[tuple[str, str]]:
        """The sample prompts of the recipe, each with the model's greedy answer."""
        prepared = self._prepared
        return generate_samples(
            self._model,
            prepared.tokenizer,
            prepared.recipe.training.sample_prompts,
            prepared.device.torch_device,
            prepared.thinking,
        )


def evaluate(
    model: Any,
    samples: TokenizedDataset,
    batches: Sequence[Sequence[PackedSamples]],
    *,
    padding_free: bool,
    pad_id: int,
    multiple: int,
    device: torch.device,
    progress: Callable[[int, int], None],
    short_answers_end: frozenset[int] | None,
) -> ValidationSums:
    """Run one pass over ``batches`` without gradients.

    Args:
        short_answers_end: token ids that end a turn, where exact matches are counted; None otherwise.
    """
    total, loss_weight_sum, exact, answered = 0.0, 0.0, 0, 0
    with no_grad_eval(model), last_hidden_states(model) as hidden:
        for done, sequences in enumerate(batches, 1):
            batch = collate(sequences, samples, padding_free=padding_free, pad_id=pad_id, multiple=multiple)
            weight_sum = sum_loss_weights(sequences, samples)
            if weight_sum:
                tensors = on_device(batch, device)
                # 1: the model returns the summed loss; it is divided by the loss weights of all batches.
                output = model(**tensors, num_items_in_batch=1)
                total += float(output.loss)
                loss_weight_sum += weight_sum
                if short_answers_end is not None:
                    labels = tensors["labels"]
                    predicted = argmax_tokens(model, output.logits, hidden[0], labels[:, 1:] != IGNORED)
                    right, total_answers = exact_answers(
                        predicted, labels, batch.get("segments"), short_answers_end
                    )
                    exact, answered = exact + right, answered + total_answers
            progress(done, len(batches))
    return ValidationSums(total, loss_weight_sum, exact, answered)


def generate_samples(
    model: Any,
    tokenizer: ChatTokenizer,
    prompts: Sequence[str],
    device: torch.device,
    thinking: Thinking = "auto",
) -> Iterator[tuple[str, str]]:
    """Yield (prompt, greedy answer) for each prompt. Draws no random numbers."""
    for prompt in prompts:
        ids = prompt_ids([Message("user", prompt)], tokenizer, thinking=thinking)
        tokens = torch.tensor([ids], device=device)
        with no_grad_eval(model):
            output = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=ANSWER_TOKENS,
                **MOST_LIKELY,
                eos_token_id=list(tokenizer.turn_end_ids) or None,
                pad_token_id=tokenizer.pad_id if tokenizer.pad_id is not None else 0,
                use_cache=True,
            )
        new = [i for i in output[0, len(ids) :].tolist() if i not in tokenizer.special_ids]
        yield prompt, tokenizer.decode(new).strip()
