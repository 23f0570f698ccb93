"""Evaluations: the file ``task_evaluation.json`` in the run's folder, its job, and its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite

import msgspec
from msgspec import Struct

from qlora_tui.checksums import digest
from qlora_tui.data.excluded_rows import RowPlace
from qlora_tui.decoding import read_json
from qlora_tui.files import atomic_write
from qlora_tui.formatting import (
    align_columns,
    capitalize,
    format_float,
    format_loss,
    format_loss_change,
    format_percent,
    format_points,
    pluralize,
)
from qlora_tui.remote.calls import changes_box
from qlora_tui.runs.damage import WEIGHTS
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.measuring import measure_in_child
from qlora_tui.runs.task_metrics.answer_metrics import Metric, TaskRow
from qlora_tui.runs.task_metrics.decisions import MOST_DECISIONS, DecisionReport, decision_lines
from qlora_tui.runs.task_metrics.intervals import MIN_ROWS, Interval, mean_interval

_JOB = "qlora_tui.chat.task_answers:evaluate"
DEFAULT_PROMPTS = 100
"""Default number of validation prompts to answer. For decisions, the default is higher."""
_MAX_BYTES = 1 << 26
_SHOWN_CHARACTERS = 300
_OF_SIDES = (2, 4)
"""Columns with the intervals of base and adapter."""
_HEADER = ("", "base", "95% interval", "adapter", "95% interval", "change", "95% interval", "p", "")


class LossChange(Struct, frozen=True, kw_only=True):
    """Validation loss on the same rows, before and after training, in nats per trained token."""

    rows: int
    before: float
    after: float
    interval: Interval | None
    """Interval of ``after - before``, by the bootstrap over rows; None for fewer than two rows."""

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float], tokens: Sequence[int]) -> LossChange:
        """Compare the losses of rows before and after training. The loss of a row is the sum over its trained
        tokens, in nats.

        Rows without trained tokens, or with a loss that is not finite, are ignored.
        """
        rows = [row for row in zip(before, after, tokens, strict=True) if all(map(isfinite, row)) and row[2]]
        total = sum(count for _, _, count in rows) or 1
        interval = mean_interval(
            [(new - old) / count for old, new, count in rows], [count for _, _, count in rows]
        )
        return cls(
            rows=len(rows),
            before=sum(old for old, _, _ in rows) / total,
            after=sum(new for _, new, _ in rows) / total,
            interval=interval if isfinite(interval.low) else None,
        )

    @property
    def is_lower(self) -> bool:
        """Whether the loss fell by more than chance explains."""
        return self.interval is not None and self.rows >= MIN_ROWS and self.interval.high < 0

    @property
    def is_higher(self) -> bool:
        """Whether the loss rose by more than chance explains."""
        return self.interval is not None and self.rows >= MIN_ROWS and self.interval.low > 0


class TaskEvaluation(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answers of base and adapter to validation prompts, with metrics and losses."""

    run: str
    adapter: str
    """Hash of the adapter's files, so that an evaluation of an earlier adapter is recognized."""
    max_new_tokens: int
    """Token limit of an answer."""
    validation_rows: int
    """Number of rows of the validation data, of which ``rows`` were answered."""
    metrics: tuple[Metric, ...]
    loss: LossChange
    rows: tuple[TaskRow, ...]
    decisions: DecisionReport | None = None
    """Report on decisions, if the answers are decisions, which are scored instead of generated."""
    seconds: float = 0.0
    is_of_run: bool = False
    """Whether the loss was measured on all validation rows at the end of the run. If not, it was measured on
    the references of the answered prompts.
    """
    is_partial: bool = False
    """Whether prompts were omitted for lack of time at the end of a run."""
    warning: str = ""
    """Warning if answers were computed differently than by transformers and peft."""


_EVALUATIONS = msgspec.json.Decoder(TaskEvaluation)


@changes_box
def evaluate_task(
    run: RunDir,
    prompts: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TaskEvaluation:
    """Let base and adapter answer validation prompts of a run. Answers that are already stored are reused.

    Args:
        run: A run that has ended with an adapter.
        prompts: Maximum number of prompts, spread evenly over the validation data; None for the default.
        progress: Called with the number of answers done and the total.
        should_stop: Ends the evaluation within a second; the answers so far are kept.

    Raises:
        JobStopped: ``should_stop`` returned true.
        UserError: The run has no adapter, no validation data or no prompts, is in use, or cannot be read.
    """
    return measure_in_child(
        _JOB, run, prompts, read=read_task_evaluation, progress=progress, should_stop=should_stop
    )


def adapter_hash(run: RunDir) -> str:
    """Return a hash of the run's adapter; empty if it has none."""
    try:
        return digest(run.adapter_dir)
    except OSError:
        pass
    try:
        # An adapter without checksums comes from an early version or another program.
        return f"{(run.adapter_dir / WEIGHTS).stat().st_size} bytes"
    except OSError:
        return ""


def write_task_evaluation(run: RunDir, evaluation: TaskEvaluation) -> None:
    """Save the evaluation in the run's folder. Raises OSError."""
    atomic_write(run.task_evaluation_path, msgspec.json.encode(evaluation))


def read_task_evaluation(run: RunDir) -> TaskEvaluation | None:
    """Return the evaluation of the run's adapter; None if it is missing, damaged, or of another adapter."""
    evaluation = read_json(run.task_evaluation_path, _EVALUATIONS, _MAX_BYTES)
    return evaluation if evaluation is not None and evaluation.adapter == adapter_hash(run) else None


def describe_metric(metric: Metric) -> str:
    """Return ``accuracy 82% versus the base's 41% on 90 prompts (+41 points, 95% interval +30 to +52)``."""
    name = "ended turns" if metric.name == "ended" else metric.name
    values = f"{name} {format_percent(metric.adapter)} versus the base's {format_percent(metric.base)}"
    if metric.rows < MIN_ROWS:
        return f"{values} on {pluralize(metric.rows, 'prompt')}, too few to tell"
    low, high = metric.difference_interval
    interval = f"{format_points(low)} to {format_points(high)}"
    change = f"{format_points(metric.difference)} points, 95% interval {interval}"
    end = "" if metric.comparison != "unclear" else ": not enough evidence"
    return f"{values} on {metric.rows:,} prompts ({change}){end}"


def describe_loss(loss: LossChange, name: str) -> str:
    """Return the loss in words, after ``name``: ``validation loss 2.10 → 1.32 on 40 rows (95% interval of the
    change −0.90 to −0.66)``.
    """
    values = f"{name} {format_loss(loss.before)} → {format_loss(loss.after)} on {pluralize(loss.rows, 'row')}"
    if loss.rows < MIN_ROWS or loss.interval is None:
        return f"{values}, too few to tell"
    low, high = loss.interval
    change = f"95% interval of the change {format_loss_change(low)} to {format_loss_change(high)}"
    end = "" if loss.is_lower or loss.is_higher else ": not enough evidence"
    return f"{values} ({change}){end}"


def report_lines(evaluation: TaskEvaluation, rows: int, *, narrow: bool = False) -> list[str]:
    """Return the lines of the report, with the answers to the first ``rows`` prompts.

    With ``narrow``, the table of metrics is narrow.
    """
    loss_name = "validation loss" if evaluation.is_of_run else "loss of the references"
    decisions = evaluation.decisions
    how = (
        f"with greedy answers of up to {evaluation.max_new_tokens:,} tokens"
        if decisions is None
        else f"each with a choice between {len(decisions.options):,} options"
    )
    lines = [
        f"{pluralize(len(evaluation.rows), 'validation prompt')} of {evaluation.run}, {how}.",
        *(f"{capitalize(describe_metric(metric))}." for metric in evaluation.metrics[:1]),
        *([f"{capitalize(describe_loss(evaluation.loss, loss_name))}."] if evaluation.loss.rows else []),
        "",
        *metric_table(evaluation.metrics, narrow=narrow),
    ]
    if decisions is not None:
        lines += ["", *decision_lines(decisions)]
    if evaluation.is_partial:
        most = DEFAULT_PROMPTS if decisions is None else MOST_DECISIONS
        lines += [
            "",
            f"Measured at the end of the run, in at most 3% of its time. To evaluate up to {most:,} prompts: "
            f"qlora-tui evaluate {evaluation.run} --again",
        ]
    if evaluation.warning:
        lines += ["", f"warning: {evaluation.warning}"]
    for row in evaluation.rows[:rows]:
        lines += ["", *_row_lines(row)]
    return lines


def metric_table(metrics: Sequence[Metric], *, narrow: bool = False) -> list[str]:
    """Return the lines of a table with the metrics of base and adapter and their intervals, after a header.

    A narrow table has only the interval of the change, and short verdicts: at most 69 columns.
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
        format_percent(metric.base),
        _range(metric.base_interval),
        format_percent(metric.adapter),
        _range(metric.adapter_interval),
        format_points(metric.difference),
        " to ".join(map(format_points, metric.difference_interval)),
        "" if metric.p is None else "<0.001" if metric.p < 0.001 else format_float(metric.p, 2),
        "not enough evidence" if metric.comparison == "unclear" else metric.comparison,
    )


def _range(interval: Interval) -> str:
    return "{:.0f} to {:.0f}".format(*(100 * edge for edge in interval))
