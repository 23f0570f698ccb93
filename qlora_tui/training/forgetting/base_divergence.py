"""How far a model has moved from its base on general prompts, in nats for each token of the base's answers.

The KL divergence of the model from the base is computed over the base's most likely tokens, each by itself,
and all others together::

    base      0.7  0.2  | 0.1          stored: log 0.7, log 0.2
    model     0.5  0.1  | 0.4
    0.7 log(0.7 / 0.5) + 0.2 log(0.2 / 0.1) + 0.1 log(0.1 / 0.4) = 0.236

Putting tokens together can only lower a KL divergence, so this never exceeds the exact one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_tui.runs.events import GeneralAnswers
from qlora_tui.training.answers import answer_greedily
from qlora_tui.training.batches import RowShape
from qlora_tui.training.forgetting import base_answers
from qlora_tui.training.forgetting.answer_checks import AnswerCounts, GeneralAnswer, count_answers
from qlora_tui.training.forgetting.base_answers import BaseAnswer
from qlora_tui.training.forgetting.general_prompts import GENERAL_PROMPTS
from qlora_tui.training.head_chunks import block_rows
from qlora_tui.training.run import Run
from qlora_tui.training.scoring import answer_logits, no_grad_eval
from qlora_tui.training.trainable_tokens import row_wrappers, rows_of


class DivergenceSums(NamedTuple):
    """Sums over the base's answers, which can be added over processes."""

    divergence: float
    """Sum of KL(base ‖ model) over the places, in nats."""
    places: int
    turns: int
    """Answers that the base ended."""
    turns_ended: int
    """Those where the model finds an end most likely at the same place."""


class BaseDivergence:
    """Compares a run's model with its base, whenever it is asked."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._model = run.model
        self._shape = run.shape
        count = run.recipe.training.general_prompts
        self._prompts = base_answers.prompt_tokens(GENERAL_PROMPTS[:count], run.tokenizer, run.thinking)
        self._answers: tuple[BaseAnswer, ...] | None = None

    def count_answers(self) -> GeneralAnswers | None:
        """Let the model answer the general prompts, and count ends, loops, refusals and JSON.

        Generating takes some four times as long as :meth:`measure` on a CPU, so this is for the end of a run.
        Each process of the run answers its share of the prompts.

        Returns:
            None where the chat template refuses all prompts.
        """
        run, dist = self._run, self._run.dist
        if not self._prompts:
            return None
        if self._answers is None:
            self._answers = self._base_answers()
        texts, ids = list(self._prompts), list(self._prompts.values())
        mine = slice(dist.rank, None, dist.world_size)
        answers: list[tuple[int, ...]] = []
        if ids[mine]:
            answers = answer_greedily(self._model, ids[mine], run.tokenizer, run.device.torch_device)
        base = [answer.ids[answer.prompt_tokens :] for answer in self._answers[mine]]
        counts = [*self._count(texts[mine], answers), *self._count(texts[mine], base)]
        total = [int(count) for count in dist.all_reduce_sum(tuple(counts))]
        half = len(total) // 2
        model, before = AnswerCounts(*total[:half]), AnswerCounts(*total[half:])
        return GeneralAnswers(
            answers=model.answers,
            ended=model.ended,
            base_ended=before.ended,
            looping=model.looping,
            base_looping=before.looping,
            refused=model.refused,
            base_refused=before.refused,
            json_prompts=model.json_prompts,
            json_valid=model.json_valid,
            base_json_valid=before.json_valid,
        )

    def _count(self, prompts: Sequence[str], answers: Sequence[Sequence[int]]) -> AnswerCounts:
        tokenizer = self._run.tokenizer
        return count_answers(
            GeneralAnswer(
                prompt,
                tokenizer.decode([i for i in ids if i not in tokenizer.special_ids]).strip(),
                ended=ids[-1] in tokenizer.turn_end_ids,
            )
            for prompt, ids in zip(prompts, answers, strict=True)
        )

    def measure(self) -> tuple[float, float | None]:
        """Mean KL(base ‖ model) in nats, and the share of the base's turn ends that the model keeps.

        The base's answers are computed when they are first needed, or read from the cache. Each process of
        the run compares its share of them. Before training the model is its base, and nothing is computed.
        """
        run = self._run
        if not self._prompts or equals_base(self._model):
            return 0.0, None
        if self._answers is None:
            self._answers = self._base_answers()
        dist = run.dist
        local_sums = compare_with_base(
            self._model,
            self._answers[dist.rank :: dist.world_size],
            frozenset(run.tokenizer.turn_end_ids),
            self._shape,
            run.device.torch_device,
        )
        divergence, places, turns, turns_ended = dist.all_reduce_sum(local_sums)
        return divergence / max(places, 1), turns_ended / turns if turns else None

    def _base_answers(self) -> tuple[BaseAnswer, ...]:
        run = self._run
        prompts = tuple(self._prompts.values())
        path = base_answers.cache_path(run.base.folder, run.recipe, run.device, prompts)
        answers = base_answers.read(path, prompts)
        if answers is None:
            run.reporter.phase("evaluating", "the base's answers to general prompts, once for this base")
            with self._model.disable_adapter():
                answers = base_answers.compute(
                    self._model,
                    prompts,
                    run.tokenizer,
                    self._shape,
                    run.device.torch_device,
                    lambda done, total: run.reporter.progress("evaluating", done, total),
                )
            if run.dist.is_main_process:
                base_answers.write(path, answers)
            run.reporter.phase("evaluating")
        return answers


def equals_base(model: Any) -> bool:
    """Whether the adapter of a peft model changes nothing yet.

    Every second half of it is zero, and trained rows of tokens are those of the base.
    """
    halves = [parameter for name, parameter in model.named_parameters() if ".lora_B." in name]
    others = any("lora_embedding" in name for name, _ in model.named_parameters())
    if not halves or others or any(bool(half.any()) for half in halves):
        return False
    return all(
        torch.equal(rows.values, wrapper.original_module.weight[rows.ids].to(rows.values.dtype))
        for wrapper in row_wrappers(model)
        for rows in (rows_of(wrapper, "default"),)
    )


def compare_with_base(
    model: Any,
    answers: Sequence[BaseAnswer],
    turn_ends: frozenset[int],
    shape: RowShape,
    device: torch.device,
) -> DivergenceSums:
    """Run a model over the base's answers without gradients."""
    divergence, places, turns, turns_ended = 0.0, 0, 0, 0
    with no_grad_eval(model):
        for number, logits in answer_logits(model, answers, shape, device):
            answer = answers[number]
            divergence += float(divergence_of_top(logits, answer).sum())
            places += len(answer.places)
            if answer.ids[-1] in turn_ends:
                turns += 1
                turns_ended += int(logits[-1].argmax()) in turn_ends
    return DivergenceSums(divergence, places, turns, turns_ended)


def divergence_of_top(logits: Tensor, answer: BaseAnswer) -> Tensor:
    """KL(base ‖ model) at each place, (places,), from the model's logits, (places, vocabulary)."""
    base = answer.top_log_probabilities.to(logits.device)
    top_ids = answer.top_ids.to(logits.device, torch.int64)
    rows = block_rows(logits.device)
    model = torch.cat(
        [
            block.gather(-1, ids).float() - block.float().logsumexp(-1, keepdim=True)
            for block, ids in zip(torch.split(logits, rows), torch.split(top_ids, rows), strict=True)
        ]
    )
    rest, model_rest = _log_of_rest(base), _log_of_rest(model)
    return (base.exp() * (base - model)).sum(-1) + rest.exp() * (rest - model_rest)


def _log_of_rest(log_probabilities: Tensor) -> Tensor:
    """Log-probability of all tokens but these, (places,); at least that of rounding."""
    rest = 1.0 - log_probabilities.double().exp().sum(-1)
    return rest.clamp(min=1e-7).log().float()
