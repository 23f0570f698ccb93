"""Answers of base and adapter to validation prompts at the end of a run, where they can be right or wrong.

They cost at most :data:`RUN_SHARE` of the time that the run has trained: batches are answered by both until
that is over, and a batch that is cut off counts nothing. ``qlora-tui evaluate`` measures more, or later.

A prompt is what the model read in training before the last answer of a row that is in the loss::

    ids        <user> how are you <end> <assistant> fine <end>
    mask         0     0   0   0    0        0        1    1
    prompt     ------------------------------------
    reference                                         ----------
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from qlora_tui.data.conversation import Conversation
from qlora_tui.data.excluded_rows import file_names
from qlora_tui.data.read import row_at
from qlora_tui.data.sources import conversation_of, every_source, open_file_of, paths_of
from qlora_tui.data.store import GOOD, Samples
from qlora_tui.data.tokenizer import AnswerDecoder, ChatTokenizer
from qlora_tui.recipe.schema import Data
from qlora_tui.runs.events import AnswersCompared
from qlora_tui.runs.task_metrics.answer_metrics import TaskRow, measure_answers, read_calls
from qlora_tui.runs.task_metrics.intervals import MIN_ROWS
from qlora_tui.runs.task_metrics.task_evaluation import (
    LossChange,
    TaskEvaluation,
    adapter_hash,
    write_task_evaluation,
)
from qlora_tui.training.answers import answer_greedily
from qlora_tui.training.host import release_gpu_memory
from qlora_tui.training.run import Run

_MIN_NEW_TOKENS, _MAX_NEW_TOKENS = 32, 512
_STEP_TOKENS = 32
"""The limit of an answer is a multiple of this, so that answers to other rows are stored in the same file."""


class TaskPrompt(NamedTuple):
    """One prompt with its reference."""

    source: int
    row: int
    file: str
    """Name of the row's file in the source; empty where the source is one file."""
    ids: tuple[int, ...]
    """Token ids of the prompt."""
    reference: tuple[int, ...]
    """Token ids of the reference answer, without what follows its turn end."""
    sample: int
    """Number of its sample in the validation data."""


def task_prompts(samples: Samples, turn_ends: frozenset[int], most: int) -> list[TaskPrompt]:
    """Up to ``most`` prompts, spread evenly over the rows.

    Rows that were cut before the end of their answer, and rows without a prompt, have none.

    Args:
        samples: the validation data.
        turn_ends: token ids that end a turn.
        most: at least 1.
    """
    prompts = []
    for i in range(len(samples)):
        place = *samples.origin(i), samples.file_name(i)
        if i + 1 < len(samples) and (*samples.origin(i + 1), samples.file_name(i + 1)) == place:
            # With this template, each turn of this row is a separate sample.
            continue
        ids, mask = tuple(samples.token_ids(i)), tuple(samples.loss_mask(i))
        bounds = last_answer(ids, mask, turn_ends)
        if bounds is not None:
            start, end = bounds
            prompts.append(TaskPrompt(*place, ids[:start], ids[start:end], i))
    count = min(len(prompts), most)
    return [prompts[number * len(prompts) // count] for number in range(count)]


def answer_limit(longest_reference: int, context_length: int) -> int:
    """Most tokens of an answer: half as many again as the longest reference, in steps, within the context."""
    wanted = -(-longest_reference * 3 // (2 * _STEP_TOKENS)) * _STEP_TOKENS
    return min(max(_MIN_NEW_TOKENS, wanted), _MAX_NEW_TOKENS, max(1, context_length // 2))


def last_answer(ids: Sequence[int], mask: Sequence[int], turn_ends: frozenset[int]) -> tuple[int, int] | None:
    """Start and end of the last stretch in the loss, up to its turn end; None where it is cut, or is all."""
    stop = next((place + 1 for place in range(len(mask) - 1, -1, -1) if mask[place]), 0)
    start = stop
    while start and mask[start - 1]:
        start -= 1
    end = next((place + 1 for place in range(stop - 1, start - 1, -1) if ids[place] in turn_ends), 0)
    return (start, end) if start > 0 and end > start + 1 else None


_PROMPT_TOKENS_SHOWN = 200


class TaskRows:
    """Turns prompts and answers of one recipe's data from token ids into text."""

    def __init__(self, data: Data, tokenizer: ChatTokenizer) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._decoder = AnswerDecoder(tokenizer)
        self._ends = frozenset(tokenizer.turn_end_ids)

    def row(self, prompt: TaskPrompt, base: Sequence[int], adapter: Sequence[int]) -> TaskRow:
        """The record of a prompt.

        Args:
            prompt: with its reference.
            base: token ids of the base's answer, with its turn end.
            adapter: those of the adapter's.

        Raises:
            UserError: the row offers tools and cannot be read again.
        """
        reference = self._raw(prompt.reference)
        tools = self._tools(prompt) if read_calls(reference) else ()
        return TaskRow(
            source=prompt.source,
            row=prompt.row,
            file=prompt.file,
            prompt=self._tokenizer.decode(prompt.ids[-_PROMPT_TOKENS_SHOWN:]),
            reference=self._decoder.answer(prompt.ids, prompt.reference),
            base=self._decoder.answer(prompt.ids, base),
            adapter=self._decoder.answer(prompt.ids, adapter),
            base_ended=base[-1] in self._ends,
            adapter_ended=adapter[-1] in self._ends,
            tools=tools,
            reference_raw=reference if tools else "",
            base_raw=self._raw(base) if tools else "",
            adapter_raw=self._raw(adapter) if tools else "",
        )

    def _raw(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i not in self._ends])

    def _tools(self, prompt: TaskPrompt) -> tuple[dict[str, Any], ...]:
        """The tools that a row offers."""
        source = every_source(self._data)[prompt.source]
        paths, _ = paths_of(source)
        path = paths[file_names(source.path, paths).index(prompt.file)]
        row = row_at(path, prompt.row)
        file = open_file_of(source, self._data.preferences, str(path))
        conversation = conversation_of(row, file) if row is not None else None
        return conversation.tools if isinstance(conversation, Conversation) else ()


RUN_SHARE = 0.03
"""Most of the training time that the answers may take."""
_MIN_SECONDS = 1.0
"""Less time than this is not worth beginning."""
_BATCH_ROWS = 8
_SEED = 0


def answer_validation(
    run: Run,
    training_seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> TaskEvaluation | None:
    """Let base and adapter answer up to ``training.task_prompts`` validation prompts.

    Draws no random numbers of torch, and changes no weight. An error, such as too little memory, costs the
    answers and not the run, whose adapter is on the disk by now.

    Args:
        training_seconds: how long the run has trained.
        clock: seconds that only grow.

    Returns:
        The answers without losses; None where references are free text, on several GPUs, without validation
        data, and where there is not enough time.
    """
    samples = run.data.validation.of_side(GOOD)
    most = run.recipe.training.task_prompts
    if not most or not len(samples) or run.dist.world_size > 1:
        return None
    try:
        prompts = task_prompts(samples, frozenset(run.tokenizer.turn_end_ids), most)
        texts = TaskRows(run.recipe.data, run.tokenizer)
        if not _can_be_right(prompts, texts):
            return None
        return _evaluate(run, prompts, texts, len(samples), RUN_SHARE * training_seconds, clock)
    except Exception as error:
        _log_error(run, error)
    release_gpu_memory()
    return None


def report_answers(run: Run, answers: TaskEvaluation | None, loss: LossChange | None) -> None:
    """Write and report answers; an error costs them, and not the run.

    Args:
        answers: what :func:`answer_validation` returned.
        loss: the loss of the validation rows; None where it was not compared.
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
    """Whether the references are labels, JSON, tool calls or a few words."""
    if len(prompts) < MIN_ROWS:
        return False
    metrics, _ = measure_answers([texts.row(each, each.reference, each.reference) for each in prompts])
    return metrics[0].name != "token F1"


def _evaluate(
    run: Run,
    prompts: Sequence[TaskPrompt],
    texts: TaskRows,
    validation_rows: int,
    budget_s: float,
    clock: Callable[[], float],
) -> TaskEvaluation | None:
    reporter = run.reporter
    later = f"`qlora-tui evaluate {run.directory.id}` measures them"
    if budget_s < _MIN_SECONDS:
        reporter.log(
            f"the answers were not compared: {RUN_SHARE:.0%} of such a short run is not enough time; {later}"
        )
        return None
    reporter.phase("evaluating", "answers of base and adapter to validation prompts")
    started = clock()
    answered, limit = _answer(run, prompts, started + budget_s, clock)
    if len(answered) < MIN_ROWS:
        reporter.log(
            f"the answers were not compared: {len(answered)} of {len(prompts)} prompts were answered within "
            f"{RUN_SHARE:.0%} of the training time; {later}"
        )
        return None
    rows = [texts.row(prompts[number], *answered[number]) for number in sorted(answered)]
    metrics, labels = measure_answers(rows)
    return TaskEvaluation(
        run=run.directory.id,
        adapter=adapter_hash(run.directory),
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
    run: Run,
    prompts: Sequence[TaskPrompt],
    deadline: float,
    clock: Callable[[], float],
) -> tuple[dict[int, tuple[tuple[int, ...], tuple[int, ...]]], int]:
    """Answers of base and adapter by the number of the prompt, and their most tokens."""
    model = run.model
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30))
    limit = answer_limit(max(len(prompt.reference) for prompt in prompts), context)
    # What is answered in time is then spread over the data.
    order = random.Random(_SEED).sample(range(len(prompts)), len(prompts))
    answered: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def answers(ids: Sequence[Sequence[int]], seconds: float) -> list[tuple[int, ...]]:
        device = run.device.torch_device
        return answer_greedily(model, ids, run.tokenizer, device, limit, max_seconds=max(0.0, seconds))

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
        run.reporter.progress("evaluating", len(answered), len(prompts))
    return answered, limit
