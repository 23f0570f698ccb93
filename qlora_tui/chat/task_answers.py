"""The job in which base and adapter answer the validation prompts of a run.

The job loads the run's base with its final adapter, and lets base and adapter answer each prompt. If answers
are free text, both answer greedily in batches, and the loss of each reference answer is measured with both.
If answers are decisions, both score the options. Then the job writes the file of
:mod:`qlora_tui.runs.task_metrics.task_evaluation`, the module that starts this job.

Answers are stored as soon as they are complete. A file of answers belongs to one base, one adapter, and one
token limit or set of options. Each of its lines holds the hash of a prompt, and the token ids of its answer
or the scores of the options. An interrupted evaluation continues from these files. If several runs have the
same base and data, they share the base's answers.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
from msgspec import Struct

from qlora_tui.decoding import try_json
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.files import open_append, read_regular
from qlora_tui.gpu.torch_env import faster_imports
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.measuring import measuring
from qlora_tui.runs.task_metrics.decisions import MOST_DECISIONS, write_decider
from qlora_tui.runs.task_metrics.task_evaluation import (
    DEFAULT_PROMPTS,
    LossChange,
    TaskEvaluation,
    adapter_hash,
    write_task_evaluation,
)
from qlora_tui.worker import Report

if TYPE_CHECKING:
    from qlora_tui.chat.session import ChatSession
    from qlora_tui.data.store import Samples
    from qlora_tui.training.decisions import DecisionTask
    from qlora_tui.training.option_scores import Scores
    from qlora_tui.training.task_prompts import TaskPrompt, TaskRows


BATCH_ROWS = 16
_BATCH_TOKENS = 8192
"""Maximum number of tokens in a batch, including prompts and answers."""
_MAX_BYTES = 1 << 28

T = TypeVar("T", int, float)
"""Item type of a stored answer: its token ids, or the scores of the options."""

AnswerBatch = Callable[[list[tuple[int, ...]]], Sequence[tuple[T, ...]]]
"""A function that answers prompts of token ids."""


class _Line(Struct, Generic[T], frozen=True):
    prompt: str
    answer: tuple[T, ...]


class AnswerStore(Generic[T]):
    """Stored answers in a file, by prompt."""

    def __init__(self, path: Path, kind: type[T]) -> None:
        self._path = path
        self._answers: dict[str, tuple[T, ...]] = {}
        lines = msgspec.json.Decoder(_Line[kind])  # type: ignore[valid-type]  # msgspec reads the type at run time
        try:
            content = read_regular(path, _MAX_BYTES)
        except OSError:
            content = b""
        for line in content.splitlines():
            # The last line of a process that was killed may be incomplete.
            if (stored := try_json(line, lines)) is not None:
                self._answers[stored.prompt] = stored.answer
        self._is_torn = bool(content) and not content.endswith(b"\n")

    def get(self, prompt: Sequence[int]) -> tuple[T, ...] | None:
        """Return the answer to a prompt; None if it is not stored."""
        return self._answers.get(_hash(prompt))

    def add(self, prompts: Sequence[Sequence[int]], answers: Sequence[tuple[T, ...]]) -> None:
        """Store answers, one for each prompt. Raises OSError."""
        lines = [_Line(_hash(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]
        with open_append(self._path) as file:
            content = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
            file.write(b"\n" + content if self._is_torn else content)
        self._is_torn = False
        self._answers |= {line.prompt: line.answer for line in lines}


def answer_all(
    prompts: Sequence[tuple[int, ...]],
    stored: AnswerStore[T],
    max_new_tokens: int,
    answer: AnswerBatch[T],
    progress: Callable[[int], None],
) -> list[tuple[T, ...]]:
    """Return the answers to all prompts, in order. Only answers that are not stored are computed.

    Args:
        prompts: Token ids of each prompt.
        stored: Holds earlier answers, and receives the computed ones.
        max_new_tokens: Maximum number of tokens in an answer, or in all options.
        answer: Answers one batch.
        progress: Called with the number of answers that exist so far.
    """
    missing = sorted({prompt for prompt in prompts if stored.get(prompt) is None}, key=len)
    done = len(prompts) - len(missing)
    progress(done)
    for batch in _batches(missing, max_new_tokens):
        stored.add(batch, answer(batch))
        done += len(batch)
        progress(done)
    answers = [stored.get(prompt) for prompt in prompts]
    return [each for each in answers if each is not None]


def _batches(prompts: Sequence[tuple[int, ...]], max_new_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield batches of prompts of similar length, longest first, so that lack of memory shows at once."""
    batch: list[tuple[int, ...]] = []
    for prompt in reversed(prompts):
        longest = len(batch[0]) if batch else len(prompt)
        if batch and (
            len(batch) == BATCH_ROWS or (len(batch) + 1) * (longest + max_new_tokens) > _BATCH_TOKENS
        ):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _hash(prompt: Sequence[int]) -> str:
    return hashlib.blake2b(array("I", prompt).tobytes(), digest_size=16).hexdigest()


_FORMAT = 2
"""Increase this number when the same model and prompt may give a different answer."""
_HEAD_ROWS = 256
"""Number of vocabulary-wide rows computed at a time."""


def evaluate(folder: Path, most_prompts: int | None, report: Report) -> None:
    """Let base and adapter answer up to ``most_prompts`` validation prompts, and write the result.

    With None, the usual number of prompts is used.

    Raises:
        UserError: The run has no adapter, no validation data or no prompts, is in use, or cannot be read.
        OSError: The result cannot be written.
    """
    with measuring(folder) as run:
        answer_prompts(run, most_prompts, report)


def answer_prompts(
    run: RunDir, most_prompts: int | None, report: Report = lambda done, total, text="": None
) -> None:
    """Do the work of :func:`evaluate` in this process, on a run that no other process changes."""
    with faster_imports():
        from qlora_tui.chat.chat_sources import run_source
        from qlora_tui.chat.chat_types import ADAPTER
        from qlora_tui.chat.effect_measurement import session_data, validation_samples
        from qlora_tui.chat.loading import load_session
        from qlora_tui.training.decisions import find_decisions
        from qlora_tui.training.host import lower_priority
        from qlora_tui.training.task_prompts import TaskRows

    started = time.monotonic()
    source = run_source(run)
    session = load_session(source, streams=True)
    if session.compute_device.kind == "cpu":
        lower_priority()
    session.ensure_loaded(ADAPTER)
    data = session_data(session)
    samples = validation_samples(data)
    texts = TaskRows(session.source.recipe.data, session.tokenizer)
    task = find_decisions(source.recipe, data, session.tokenizer, most_prompts or MOST_DECISIONS)
    prompts = task.prompts if task is not None else _prompts(session, samples, most_prompts)
    if not prompts:
        raise UserError(
            "No prompts to answer",
            what=f"No validation row of {run.id} has a prompt and a complete answer.",
            why="The rows are plain text, or longer than the sequence length.",
            fix="Raise data.max_length, or compare the validation loss on the Runs screen.",
            exit_code=EXIT_USAGE,
        )
    if task is not None:
        measured = _decide(session, task, texts, run, report)
    else:
        measured = _answer(session, prompts, texts, run, report)
    evaluation = TaskEvaluation(
        run=run.id,
        adapter=adapter_hash(run),
        validation_rows=len(samples),
        seconds=time.monotonic() - started,
        warning=session.warning,
        **measured,
    )
    write_task_evaluation(run, evaluation)


def _prompts(session: ChatSession, samples: Samples, most: int | None) -> Sequence[TaskPrompt]:
    from qlora_tui.training.task_prompts import task_prompts

    return task_prompts(samples, frozenset(session.tokenizer.turn_end_ids), most or DEFAULT_PROMPTS)


def _decide(
    session: ChatSession, task: DecisionTask, texts: TaskRows, run: RunDir, report: Report
) -> dict[str, Any]:
    """Score the options of each prompt with both models, and write the calibration next to the adapter."""
    from qlora_tui.training.decisions import judge
    from qlora_tui.training.option_scores import Choice

    numbers = range(len(task.prompts))
    prompts = [task.choice(number, session.context_length).prompt for number in numbers]

    def score(name: str, batch: list[tuple[int, ...]]) -> list[Scores]:
        return session.score_options(name, [Choice(prompt, task.option_ids) for prompt in batch])

    before, after = _by_both(
        session,
        run,
        prompts,
        {"options": task.option_ids},
        float,
        sum(map(len, task.option_ids)),
        score,
        report,
    )
    judged = judge(task, numbers, before, after, texts)
    write_decider(run.adapter_dir, judged.decider)
    return {
        "max_new_tokens": max(map(len, task.option_ids)),
        "metrics": judged.metrics,
        "decisions": judged.report,
        "loss": judged.loss,
        "rows": judged.rows,
    }


def _answer(
    session: ChatSession, prompts: Sequence[TaskPrompt], texts: TaskRows, run: RunDir, report: Report
) -> dict[str, Any]:
    """Let both models answer each prompt."""
    from qlora_tui.chat.chat_types import ADAPTER, BASE
    from qlora_tui.runs.task_metrics.answer_metrics import measure_answers
    from qlora_tui.training.task_prompts import answer_limit

    for name in (BASE, ADAPTER):
        session.check(name, list(prompts[0].ids))
    total = 2 * len(prompts)
    report(0, total)
    before, after = (
        [_reference_loss(session, name, prompt) for prompt in prompts] for name in (BASE, ADAPTER)
    )
    limit = answer_limit(max(len(prompt.reference) for prompt in prompts), session.context_length)
    ids = [prompt.ids[-(session.context_length - limit) :] for prompt in prompts]
    answer = partial(session.greedy_batch, max_new_tokens=limit)
    answers = _by_both(session, run, ids, {"limit": limit}, int, limit, answer, report)
    rows = [texts.row(prompt, *both) for prompt, *both in zip(prompts, *answers, strict=True)]
    return {
        "max_new_tokens": limit,
        "metrics": measure_answers(rows),
        "loss": LossChange.of(before, after, [len(prompt.reference) for prompt in prompts]),
        "rows": tuple(rows),
    }


def _by_both(
    session: ChatSession,
    run: RunDir,
    prompts: Sequence[tuple[int, ...]],
    state: dict[str, Any],
    kind: type[T],
    most_tokens: int,
    answer: Callable[[str, list[tuple[int, ...]]], Sequence[tuple[T, ...]]],
    report: Report,
) -> list[list[tuple[T, ...]]]:
    """Return the answers of base and adapter to prompts, in order, using answers stored by earlier attempts.

    Args:
        session: The loaded model.
        run: The run that trained the adapter.
        prompts: Token ids of each prompt.
        state: Everything else that the answers depend on.
        kind: Type of an answer's items.
        most_tokens: Maximum number of tokens in an answer, or in all options.
        answer: Answers a batch with the base or the adapter, given its name.
        report: Called with the number of answers done.
    """
    from qlora_tui.chat.chat_types import ADAPTER, BASE

    return [
        answer_all(
            prompts,
            AnswerStore(_answers_path(session, adapter, state), kind),
            most_tokens,
            partial(answer, name),
            partial(_report_done, report, number * len(prompts), 2 * len(prompts)),
        )
        for number, (name, adapter) in enumerate(((BASE, ""), (ADAPTER, adapter_hash(run))))
    ]


def _report_done(report: Report, before: int, total: int, done: int) -> None:
    report(before + done, total)


def _answers_path(session: ChatSession, adapter: str, more: dict[str, Any]) -> Path:
    """Return the file with the answers of the session's base with an adapter.

    ``adapter`` is the adapter's hash; it is empty for the answers of the base alone. ``more`` holds
    everything else that the answers depend on.
    """
    from qlora_tui import paths
    from qlora_tui.adapters.base_weights import model_folder
    from qlora_tui.files import private_dir
    from qlora_tui.training.compute_device import versions
    from qlora_tui.training.quantized_cache import base_state, cache_name

    recipe = session.source.recipe
    state = base_state(_FORMAT, model_folder(recipe), recipe, session.compute_device) | {
        "adapter": adapter,
        "ends": sorted(session.tokenizer.turn_end_ids),
        "versions": versions(),
        **more,
    }
    name = cache_name(recipe, state, "adapter" if adapter else "base")
    return private_dir(paths.cache_dir() / "task-answers") / f"{name}.jsonl"


def _reference_loss(session: ChatSession, adapter_name: str, prompt: TaskPrompt) -> float:
    """Return the sum of the losses of the reference's tokens, in nats."""
    import torch
    from torch.nn import functional

    ids = [*prompt.ids, *prompt.reference]
    places = list(range(len(prompt.ids) - 1, len(ids) - 1))
    targets = torch.tensor(prompt.reference, device=session.device)
    with torch.inference_mode():
        inputs, _ = session.head_inputs(adapter_name, ids, places)
        parts = zip(torch.split(inputs, _HEAD_ROWS), torch.split(targets, _HEAD_ROWS), strict=True)
        return sum(
            float(functional.cross_entropy(session.head.logits(part), wanted, reduction="sum"))
            for part, wanted in parts
        )
