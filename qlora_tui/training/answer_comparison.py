"""Answers of base and adapter to validation prompts at the end of a run, where they can be right or wrong.

They cost at most :data:`RUN_SHARE` of the time that the run has trained: batches are answered by both until
that is over, and a batch that is cut off counts nothing. ``qlora-tui evaluate`` measures more, or later.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from qlora_tui.data.store import GOOD
from qlora_tui.runs.events import AnswersCompared
from qlora_tui.runs.task_metrics.answer_metrics import measure_answers
from qlora_tui.runs.task_metrics.intervals import MIN_ROWS
from qlora_tui.runs.task_metrics.task_evaluation import (
    LossChange,
    TaskEvaluation,
    adapter_hash,
    write_task_evaluation,
)
from qlora_tui.training.forgetting.greedy_answers import answer_greedily
from qlora_tui.training.heap import release_gpu_memory
from qlora_tui.training.prepared_run import PreparedRun
from qlora_tui.training.task_prompts import TaskPrompt, answer_limit, task_prompts
from qlora_tui.training.task_rows import TaskRows

RUN_SHARE = 0.03
"""Most of the training time that the answers may take."""
_MIN_SECONDS = 1.0
"""Less time than this is not worth beginning."""
_BATCH_ROWS = 8
_SEED = 0


def answer_validation(
    prepared: PreparedRun,
    model: Any,
    training_seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> TaskEvaluation | None:
    """Let base and adapter answer up to ``training.task_prompts`` validation prompts.

    Draws no random numbers of torch, and changes no weight. An error, such as too little memory, costs the
    answers and not the run, whose adapter is on the disk by now.

    Args:
        model: with the final adapter.
        training_seconds: how long the run has trained.
        clock: seconds that only grow.

    Returns:
        The answers without losses; None where references are free text, on several GPUs, without validation
        data, and where there is not enough time.
    """
    samples = prepared.data.validation.of_side(GOOD)
    most = prepared.recipe.training.task_prompts
    if not most or not len(samples) or prepared.dist.world_size > 1:
        return None
    try:
        prompts = task_prompts(samples, frozenset(prepared.tokenizer.turn_end_ids), most)
        texts = TaskRows(prepared.recipe.data, prepared.tokenizer)
        if not _can_be_right(prompts, texts):
            return None
        return _evaluate(prepared, model, prompts, texts, len(samples), RUN_SHARE * training_seconds, clock)
    except Exception as error:
        _log_error(prepared, error)
    release_gpu_memory()
    return None


def report_answers(prepared: PreparedRun, answers: TaskEvaluation | None, loss: LossChange | None) -> None:
    """Write and report answers; an error costs them, and not the run.

    Args:
        answers: what :func:`answer_validation` returned.
        loss: the loss of the validation rows; None where it was not compared.
    """
    if answers is None:
        return
    try:
        whole = msgspec.structs.replace(answers, loss=loss or answers.loss, is_of_run=loss is not None)
        write_task_evaluation(prepared.run, whole)
    except OSError as error:
        _log_error(prepared, error)
        return
    first = answers.metrics[0]
    prepared.reporter.emit(
        AnswersCompared(
            at=time.time(),
            metric=first.name,
            prompts=first.rows,
            base=first.base,
            adapter=first.adapter,
            low=first.difference_interval.low,
            high=first.difference_interval.high,
            comparison=first.comparison,
            seconds=answers.seconds,
        )
    )


def _log_error(prepared: PreparedRun, error: Exception) -> None:
    prepared.reporter.log(f"the answers were not compared: {type(error).__name__}: {error}")


def _can_be_right(prompts: Sequence[TaskPrompt], texts: TaskRows) -> bool:
    """Whether the references are labels, JSON, tool calls or a few words."""
    if len(prompts) < MIN_ROWS:
        return False
    metrics, _ = measure_answers([texts.row(each, each.reference, each.reference) for each in prompts])
    return metrics[0].name != "token F1"


def _evaluate(
    prepared: PreparedRun,
    model: Any,
    prompts: Sequence[TaskPrompt],
    texts: TaskRows,
    validation_rows: int,
    budget_s: float,
    clock: Callable[[], float],
) -> TaskEvaluation | None:
    reporter, run = prepared.reporter, prepared.run
    later = f"`qlora-tui evaluate {run.id}` measures them"
    if budget_s < _MIN_SECONDS:
        reporter.log(
            f"the answers were not compared: {RUN_SHARE:.0%} of so short a run is too little; {later}"
        )
        return None
    reporter.phase("evaluating", "answers of base and adapter to validation prompts")
    started = clock()
    answered, limit = _answer(prepared, model, prompts, started + budget_s, clock)
    if len(answered) < MIN_ROWS:
        reporter.log(
            f"the answers were not compared: {len(answered)} of {len(prompts)} prompts were answered within "
            f"{RUN_SHARE:.0%} of the training time; {later}"
        )
        return None
    rows = [texts.row(prompts[number], *answered[number]) for number in sorted(answered)]
    metrics, labels = measure_answers(rows)
    return TaskEvaluation(
        run=run.id,
        adapter=adapter_hash(run),
        max_new_tokens=limit,
        validation_rows=validation_rows,
        metrics=metrics,
        labels=labels,
        loss=LossChange.of([], [], []),
        rows=tuple(rows),
        seconds=clock() - started,
        is_partial=len(rows) < len(prompts),
    )


def _answer(
    prepared: PreparedRun,
    model: Any,
    prompts: Sequence[TaskPrompt],
    deadline: float,
    clock: Callable[[], float],
) -> tuple[dict[int, tuple[tuple[int, ...], tuple[int, ...]]], int]:
    """Answers of base and adapter by the number of the prompt, and their most tokens."""
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30))
    limit = answer_limit(max(len(prompt.reference) for prompt in prompts), context)
    # What is answered in time is then spread over the data.
    order = random.Random(_SEED).sample(range(len(prompts)), len(prompts))
    answered: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def answers(ids: Sequence[Sequence[int]], seconds: float) -> list[tuple[int, ...]]:
        device = prepared.device.torch_device
        return answer_greedily(model, ids, prepared.tokenizer, device, limit, max_seconds=max(0.0, seconds))

    for start in range(0, len(order), _BATCH_ROWS):
        batch = order[start : start + _BATCH_ROWS]
        ids = [prompts[number].ids[-(context - limit) :] for number in batch]
        began = clock()
        # The base hardly ever ends sooner, so an adapter that needs more than half would leave too little.
        most_s = (deadline - began) / 2
        after = answers(ids, most_s)
        if clock() - began >= most_s:
            break
        with model.disable_adapter():
            before = answers(ids, deadline - clock())
        if clock() >= deadline:
            break
        answered |= dict(zip(batch, zip(before, after, strict=True), strict=True))
        prepared.reporter.progress("evaluating", len(answered), len(prompts))
    return answered, limit
