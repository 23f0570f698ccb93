"""Answers of base and adapter to validation prompts at the end of a run, if answers can be right or wrong.

The comparison takes at most :data:`RUN_SHARE` of the run's training time. Base and adapter answer batches
until that time is over; a batch that is cut off is not counted. ``qlora-tui evaluate`` measures more rows, or
at a later time. If the answers are decisions, the options are scored and no answers are generated.
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
from qlora_tui.runs.task_metrics.decisions import write_decider
from qlora_tui.runs.task_metrics.intervals import MIN_ROWS
from qlora_tui.runs.task_metrics.task_evaluation import (
    LossChange,
    TaskEvaluation,
    adapter_hash,
    write_task_evaluation,
)
from qlora_tui.training.answers import answer_greedily
from qlora_tui.training.decisions import DecisionTask, find_decisions, judge
from qlora_tui.training.host import release_gpu_memory
from qlora_tui.training.option_scores import OptionScorer, Scores
from qlora_tui.training.run import Run
from qlora_tui.training.task_prompts import TaskPrompt, TaskRows, answer_limit, task_prompts

RUN_SHARE = 0.03
"""Maximum share of the training time that the answers may take."""
_MIN_SECONDS = 1.0
"""Minimum time for the comparison, in seconds. With less, it is not started."""
_BATCH_ROWS = 8
_DECIDED_ROWS = 32
_SEED = 0


def answer_validation(
    run: Run,
    training_seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> TaskEvaluation | None:
    """Let base and adapter answer up to ``training.task_prompts`` validation prompts.

    Draws no random numbers of torch, and changes no weight. The adapter is already on the disk, so an error,
    such as too little memory, loses only the answers and not the run.

    Args:
        training_seconds: how long the run has trained.
        clock: returns seconds that never decrease.

    Returns:
        The answers, without losses unless they are decisions. None if no prompts are requested, if there is
            no validation data, if references are free text, if too few prompts were answered in time, or
            after an error.
    """
    samples = run.data.validation.of_side(GOOD)
    most = run.recipe.training.task_prompts
    if not most or not len(samples):
        return None
    try:
        budget_s = RUN_SHARE * training_seconds
        texts = TaskRows(run.recipe.data, run.tokenizer)
        if (task := find_decisions(run.recipe, run.data, run.tokenizer)) is not None:
            return _decide(run, task, texts, len(samples), budget_s, clock)
        prompts = task_prompts(samples, frozenset(run.tokenizer.turn_end_ids), most)
        if not _can_be_right(prompts, texts):
            return None
        return _evaluate(run, prompts, texts, len(samples), budget_s, clock)
    except Exception as error:
        _log_error(run, error)
    release_gpu_memory()
    return None


def report_answers(run: Run, answers: TaskEvaluation | None, loss: LossChange | None) -> None:
    """Write and report answers. An error loses only the answers, not the run.

    Args:
        answers: the result of :func:`answer_validation`.
        loss: the loss of the validation rows; None if it was not compared.
    """
    if answers is None:
        return
    try:
        whole = msgspec.structs.replace(answers, loss=loss or answers.loss, is_of_run=loss is not None)
        write_task_evaluation(run.directory, whole)
    except OSError as error:
        _log_error(run, error)
        return
    first = answers.metrics[0]
    run.reporter.emit(
        AnswersCompared(
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


def _log_error(run: Run, error: Exception) -> None:
    run.reporter.log(f"the answers were not compared: {type(error).__name__}: {error}")


def _can_be_right(prompts: Sequence[TaskPrompt], texts: TaskRows) -> bool:
    """Return whether there are enough references, and whether they are JSON, tool calls or a few words."""
    if len(prompts) < MIN_ROWS:
        return False
    metrics = measure_answers([texts.row(each, each.reference, each.reference) for each in prompts])
    return metrics[0].name != "token F1"


def _decide(
    run: Run,
    task: DecisionTask,
    texts: TaskRows,
    validation_rows: int,
    budget_s: float,
    clock: Callable[[], float],
) -> TaskEvaluation | None:
    """Judge the decisions of base and adapter, and save the calibration in the adapter's folder.

    Returns None, and saves nothing, if too few rows can be judged in the available time.
    """
    if len(task.prompts) < MIN_ROWS or not _is_enough(run, budget_s):
        return None
    run.reporter.phase("evaluating", "decisions of base and adapter on validation rows")
    started = clock()
    model = run.model
    scorer = OptionScorer(model, run.device.dtype, run.device.torch_device)
    context = _context(model)
    order = random.Random(_SEED).sample(range(len(task.prompts)), len(task.prompts))
    scored: dict[int, tuple[Scores, Scores]] = {}
    for start in range(0, len(order), _DECIDED_ROWS):
        batch = order[start : start + _DECIDED_ROWS]
        choices = [task.choice(number, context) for number in batch]
        adapter = scorer.score(choices)
        with model.disable_adapter():
            base = scorer.score(choices)
        if clock() - started >= budget_s:
            break
        scored |= dict(zip(batch, zip(base, adapter, strict=True), strict=True))
        run.reporter.progress("evaluating", len(scored), len(order))
    if len(scored) < MIN_ROWS:
        _log_too_few(run, len(scored), len(order))
        return None
    numbers = sorted(scored)
    before, after = ([scored[number][side] for number in numbers] for side in (0, 1))
    judged = judge(task, numbers, before, after, texts)
    write_decider(run.directory.adapter_dir, judged.decider)
    return TaskEvaluation(
        run=run.directory.id,
        adapter=adapter_hash(run.directory),
        max_new_tokens=max(map(len, task.option_ids)),
        validation_rows=validation_rows,
        metrics=judged.metrics,
        decisions=judged.report,
        loss=judged.loss,
        rows=judged.rows,
        seconds=clock() - started,
        is_partial=len(numbers) < len(order),
    )


def _is_enough(run: Run, budget_s: float) -> bool:
    if budget_s >= _MIN_SECONDS:
        return True
    run.reporter.log(
        f"the answers were not compared: {RUN_SHARE:.0%} of such a short run is not enough time; "
        f"{_later(run)}"
    )
    return False


def _log_too_few(run: Run, answered: int, prompts: int) -> None:
    run.reporter.log(
        f"the answers were not compared: {answered} of {prompts} prompts were answered within "
        f"{RUN_SHARE:.0%} of the training time; {_later(run)}"
    )


def _later(run: Run) -> str:
    return f"`qlora-tui evaluate {run.directory.id}` compares them"


def _context(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30))


def _evaluate(
    run: Run,
    prompts: Sequence[TaskPrompt],
    texts: TaskRows,
    validation_rows: int,
    budget_s: float,
    clock: Callable[[], float],
) -> TaskEvaluation | None:
    if not _is_enough(run, budget_s):
        return None
    run.reporter.phase("evaluating", "answers of base and adapter to validation prompts")
    started = clock()
    answered, limit = _answer(run, prompts, started + budget_s, clock)
    if len(answered) < MIN_ROWS:
        _log_too_few(run, len(answered), len(prompts))
        return None
    rows = [texts.row(prompts[number], *answered[number]) for number in sorted(answered)]
    return TaskEvaluation(
        run=run.directory.id,
        adapter=adapter_hash(run.directory),
        max_new_tokens=limit,
        validation_rows=validation_rows,
        metrics=measure_answers(rows),
        loss=LossChange.of([], [], []),
        rows=tuple(rows),
        seconds=clock() - started,
        is_partial=len(rows) < len(prompts),
    )


def _answer(
    run: Run,
    prompts: Sequence[TaskPrompt],
    deadline: float,
    clock: Callable[[], float],
) -> tuple[dict[int, tuple[tuple[int, ...], tuple[int, ...]]], int]:
    """Return the answers of base and adapter by prompt number, and the token limit of an answer."""
    model = run.model
    context = _context(model)
    limit = answer_limit(max(len(prompt.reference) for prompt in prompts), context)
    # If time runs out, the prompts answered so far are spread over the data.
    order = random.Random(_SEED).sample(range(len(prompts)), len(prompts))
    answered: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def answers(ids: Sequence[Sequence[int]], seconds: float) -> list[tuple[int, ...]]:
        device = run.device.torch_device
        return answer_greedily(model, ids, run.tokenizer, device, limit, max_seconds=max(0.0, seconds))

    for start in range(0, len(order), _BATCH_ROWS):
        batch = order[start : start + _BATCH_ROWS]
        ids = [prompts[number].ids[-(context - limit) :] for number in batch]
        began = clock()
        # The base rarely ends sooner than the adapter, so an adapter that takes more than half leaves too
        # little time.
        most_s = (deadline - began) / 2
        after = answers(ids, most_s)
        if clock() - began >= most_s:
            break
        with model.disable_adapter():
            before = answers(ids, deadline - clock())
        if clock() >= deadline:
            break
        answered |= dict(zip(batch, zip(before, after, strict=True), strict=True))
        run.reporter.progress("evaluating", len(answered), len(prompts))
    return answered, limit
