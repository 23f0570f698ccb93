"""Results of lm-eval's tasks, in ``harness_results.json`` of the run's folder, and as text.

Written by ``chat.harness_worker``, one result for each task, the latest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct

from qlora_tui.decoding import decode_json
from qlora_tui.files import atomic_write, read_regular
from qlora_tui.formatting import pluralize
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.task_metrics.answer_metrics import Metric, compare_means, compare_shares
from qlora_tui.runs.task_metrics.task_evaluation import adapter_hash, describe_metric
from qlora_tui.runs.task_metrics.task_report import metric_table, row_lines

_MAX_BYTES = 1 << 26
_KEPT_CHARACTERS = 2000


class HarnessAnswer(Struct, frozen=True):
    """What base and adapter answered to one row."""

    row: int
    """From 1."""
    target: str
    base: str
    """The answer, or the log-likelihood of each choice."""
    adapter: str


class HarnessResult(Struct, frozen=True, kw_only=True):
    """One task of lm-eval, done by base and adapter on the same prompts."""

    task: str
    adapter: str
    """Hash of the adapter's files."""
    chat: bool
    """Whether prompts were turns of the chat template."""
    rows: int
    metrics: tuple[Metric, ...]
    answers: tuple[HarnessAnswer, ...]
    seconds: float


_RESULTS = msgspec.json.Decoder(tuple[HarnessResult, ...])

Samples = Sequence[Mapping[str, Any]]
"""lm-eval's records: one for each row and filter."""


def compare_samples(base: Samples, adapter: Samples) -> tuple[tuple[Metric, ...], tuple[HarnessAnswer, ...]]:
    """The metrics of both sides on the same rows, and their answers.

    Args:
        base: records of the base, with ``doc_id``, ``filter``, ``metrics`` and a value for each of these.
        adapter: those of the adapter.
    """
    values: dict[str, tuple[list[float], list[float]]] = {}
    answers: dict[int, HarnessAnswer] = {}
    others = {(each["doc_id"], each["filter"]): each for each in adapter}
    for before in base:
        after = others[before["doc_id"], before["filter"]]
        for name in before["metrics"]:
            title = name if before["filter"] == "none" else f"{name} ({before['filter']})"
            ours, theirs = values.setdefault(title, ([], []))
            ours.append(float(before[name]))
            theirs.append(float(after[name]))
        number = int(before["doc_id"]) + 1
        answers.setdefault(
            number,
            HarnessAnswer(
                number, str(before["target"])[:_KEPT_CHARACTERS], _response(before), _response(after)
            ),
        )
    return tuple(_metric(title, *both) for title, both in values.items()), tuple(answers.values())


def store_results(run: RunDir, results: Sequence[HarnessResult]) -> None:
    """Add results to those of other tasks; a file that cannot be read is moved aside. Raises OSError."""
    with suppress(FileNotFoundError):
        try:
            decode_json(read_regular(run.harness_results_path, _MAX_BYTES), _RESULTS)
        except ValueError:
            run.harness_results_path.rename(run.path / f"damaged-{run.harness_results_path.name}")
    names = {result.task for result in results}
    others = [result for result in read_results(run) if result.task not in names]
    atomic_write(run.harness_results_path, msgspec.json.encode([*others, *results]))


def read_results(run: RunDir) -> tuple[HarnessResult, ...]:
    """The results of the run's adapter; empty where there are none that can be read."""
    try:
        results = decode_json(read_regular(run.harness_results_path, _MAX_BYTES), _RESULTS)
    except (OSError, ValueError):
        return ()
    current = adapter_hash(run)
    return tuple(result for result in results if result.adapter == current)


def harness_lines(run: RunDir, results: Sequence[HarnessResult], rows: int) -> list[str]:
    """The results as text, with the answers to the first ``rows`` rows of each task."""
    lines: list[str] = []
    for result in results:
        how = "as turns of the chat template" if result.chat else "as plain text, without the chat template"
        lines += ["" for _ in lines[:1]]
        lines += [
            f"{result.task}: {pluralize(result.rows, 'row')}, {how}, base and adapter of {run.id}.",
            *(f"{describe_metric(metric)}." for metric in result.metrics[:1]),
            "",
            *metric_table(result.metrics),
        ]
        for answer in result.answers[:rows]:
            texts = {"target": answer.target, "base": answer.base, "adapter": answer.adapter}
            lines += ["", *row_lines(str(answer.row), texts)]
    return lines


def _metric(name: str, base: Sequence[float], adapter: Sequence[float]) -> Metric:
    # A value that is not a number counts as wrong.
    ours, theirs = ([value if math.isfinite(value) else 0.0 for value in side] for side in (base, adapter))
    if set(ours) | set(theirs) <= {0.0, 1.0}:
        return compare_shares(name, [value == 1.0 for value in ours], [value == 1.0 for value in theirs])
    return compare_means(name, ours, theirs)


def _response(sample: Mapping[str, Any]) -> str:
    answers = sample["filtered_resps"]
    if answers and isinstance(answers[0], tuple | list):
        return ", ".join(f"{float(likelihood):.2f}" for likelihood, _ in answers)
    return " ".join(map(str, answers))[:_KEPT_CHARACTERS]
