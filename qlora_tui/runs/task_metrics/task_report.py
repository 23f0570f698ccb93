"""An evaluation as text: a table of metrics, labels, the evidence in sentences, and prompts with answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlora_tui.data.excluded_rows import RowPlace
from qlora_tui.formatting import align_columns, capitalize, pluralize
from qlora_tui.runs.task_metrics.answer_metrics import Metric, TaskRow
from qlora_tui.runs.task_metrics.intervals import Interval
from qlora_tui.runs.task_metrics.task_evaluation import (
    DEFAULT_PROMPTS,
    TaskEvaluation,
    describe_loss,
    describe_metric,
)

_SHOWN_CHARACTERS = 300
_OF_SIDES = (2, 4)
"""Columns with the intervals of base and adapter."""
_HEADER = ("", "base", "95% interval", "adapter", "95% interval", "change", "95% interval", "p", "")


def report_lines(evaluation: TaskEvaluation, rows: int, *, narrow: bool = False) -> list[str]:
    """The report, with the answers to the first ``rows`` prompts; ``narrow`` is that of the table."""
    loss_name = "validation loss" if evaluation.is_of_run else "loss of the references"
    lines = [
        f"{pluralize(len(evaluation.rows), 'validation prompt')} of {evaluation.run}, with greedy answers of "
        f"up to {evaluation.max_new_tokens:,} tokens.",
        *(f"{capitalize(describe_metric(metric))}." for metric in evaluation.metrics[:1]),
        *([f"{capitalize(describe_loss(evaluation.loss, loss_name))}."] if evaluation.loss.rows else []),
        "",
        *metric_table(evaluation.metrics, narrow=narrow),
    ]
    if evaluation.labels:
        counts = [
            (count.label, f"{count.rows:,}", f"{count.base:,}", f"{count.adapter:,}")
            for count in evaluation.labels
        ]
        lines += ["", *align_columns([("label", "rows", "base right", "adapter right"), *counts])]
    if evaluation.is_partial:
        lines += [
            "",
            f"The run measured these at its end, in at most 3% of its time. For up to {DEFAULT_PROMPTS}: "
            f"qlora-tui evaluate {evaluation.run} --again",
        ]
    if evaluation.warning:
        lines += ["", f"warning: {evaluation.warning}"]
    for row in evaluation.rows[:rows]:
        lines += ["", *_row_lines(row)]
    return lines


def metric_table(metrics: Sequence[Metric], *, narrow: bool = False) -> list[str]:
    """Metrics of base and adapter with their intervals, one a line under a header.

    A narrow table has the interval of the change only, and short verdicts: 69 columns for the longest.
    """
    table = [_HEADER, *map(_metric_cells, metrics)]
    if narrow:
        table = [tuple(cell for number, cell in enumerate(row) if number not in _OF_SIDES) for row in table]
        verdicts = ("", *(metric.comparison for metric in metrics))
        table = [(*row[:-1], verdict) for row, verdict in zip(table, verdicts, strict=True)]
    return align_columns(table)


def _row_lines(row: TaskRow) -> Iterator[str]:
    texts = {
        "prompt": row.prompt[-_SHOWN_CHARACTERS:],
        "reference": row.reference_raw or row.reference,
        "base": row.base_raw or row.base,
        "adapter": row.adapter_raw or row.adapter,
    }
    yield f"row {RowPlace(row.file, row.row)}"
    for label, text in texts.items():
        yield f"  {label:<9} {' '.join(text.split())[:_SHOWN_CHARACTERS]}"


def _metric_cells(metric: Metric) -> tuple[str, ...]:
    return (
        metric.name,
        f"{metric.base:.0%}",
        _range(metric.base_interval),
        f"{metric.adapter:.0%}",
        _range(metric.adapter_interval),
        f"{100 * metric.difference:+.0f}",
        "{:+.0f} to {:+.0f}".format(*(100 * edge for edge in metric.difference_interval)),
        "" if metric.p is None else "<0.001" if metric.p < 0.001 else f"{metric.p:.3f}",
        "not enough evidence" if metric.comparison == "unclear" else metric.comparison,
    )


def _range(interval: Interval) -> str:
    return "{:.0f} to {:.0f}".format(*(100 * edge for edge in interval))
