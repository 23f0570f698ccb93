"""``evaluate``: what the adapter of a run answers to validation prompts, beside its base."""

from __future__ import annotations

import argparse
import sys

import msgspec

from qlora_tui.cli.arguments import positive_int
from qlora_tui.cli.subcommand import CommandResult, Subcommand, format_table
from qlora_tui.cli.terminal import write_control
from qlora_tui.formatting import pluralize
from qlora_tui.runs.directory import find_run
from qlora_tui.runs.task_metrics.answer_metrics import Metric
from qlora_tui.runs.task_metrics.intervals import Interval
from qlora_tui.runs.task_metrics.task_evaluation import (
    DEFAULT_PROMPTS,
    TaskEvaluation,
    describe_loss,
    describe_metric,
    read_task_evaluation,
)
from qlora_tui.runs.task_metrics.task_job import evaluate_task

_SHOWN_CHARACTERS = 300


def run(args: argparse.Namespace) -> CommandResult:
    """Print the metrics of a run, after letting base and adapter answer where that was not done."""
    run = find_run(args.run_id)
    evaluation = None if args.again else read_task_evaluation(run)
    if evaluation is None or (args.prompts is not None and not _covers(evaluation, args.prompts)):
        evaluation = evaluate_task(run, args.prompts or DEFAULT_PROMPTS, _print_progress)
        print(file=sys.stderr)
    return CommandResult(data=_as_data(evaluation), text=_format(evaluation, args.rows))


def _covers(evaluation: TaskEvaluation, prompts: int) -> bool:
    return len(evaluation.rows) == prompts or len(evaluation.rows) == evaluation.validation_rows < prompts


def _as_data(evaluation: TaskEvaluation) -> object:
    data = msgspec.to_builtins(evaluation)
    for metric, values in zip(evaluation.metrics, data["metrics"], strict=True):
        values |= {"difference": metric.difference, "comparison": metric.comparison}
    return data


def _print_progress(done: int, total: int) -> None:
    """Show the progress in place on a terminal."""
    if sys.stderr.isatty():
        write_control(sys.stderr, "\r")
        print(f"{done:,} of {total:,} answers", end="", file=sys.stderr, flush=True)


def _format(evaluation: TaskEvaluation, rows: int) -> str:
    lines = [
        f"{pluralize(len(evaluation.rows), 'validation prompt')} of {evaluation.run}, with greedy answers of "
        f"up to {evaluation.max_new_tokens:,} tokens.",
        "",
        format_table(
            [_metric_cells(metric) for metric in evaluation.metrics],
            ["", "base", "95% interval", "adapter", "95% interval", "change", "95% interval", "p", ""],
        ),
        "",
    ]
    if evaluation.labels:
        cells = [
            [count.label, f"{count.rows:,}", f"{count.base:,}", f"{count.adapter:,}"]
            for count in evaluation.labels
        ]
        lines += [format_table(cells, ["label", "rows", "base right", "adapter right"]), ""]
    lines += [f"{_capitalized(describe_metric(metric))}." for metric in evaluation.metrics[:1]]
    lines.append(f"{_capitalized(describe_loss(evaluation.loss))}.")
    if evaluation.warning:
        lines.append(f"warning: {evaluation.warning}")
    for row in evaluation.rows[:rows]:
        lines += [
            "",
            f"row {row.row:,}",
            *(
                f"  {label:<9} {_one_line(text)}"
                for label, text in (
                    ("prompt", row.prompt[-_SHOWN_CHARACTERS:]),
                    ("reference", row.reference),
                    ("base", row.base),
                    ("adapter", row.adapter),
                )
            ),
        ]
    return "\n".join(lines)


def _metric_cells(metric: Metric) -> list[str]:
    return [
        metric.name,
        f"{metric.base:.0%}",
        _range(metric.base_interval),
        f"{metric.adapter:.0%}",
        _range(metric.adapter_interval),
        f"{100 * metric.difference:+.0f}",
        "{:+.0f} to {:+.0f}".format(*(100 * edge for edge in metric.difference_interval)),
        "" if metric.p is None else "<0.001" if metric.p < 0.001 else f"{metric.p:.3f}",
        "not enough evidence" if metric.comparison == "unclear" else metric.comparison,
    ]


def _range(interval: Interval) -> str:
    return "{:.0f} to {:.0f}".format(*(100 * edge for edge in interval))


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_SHOWN_CHARACTERS]


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_id", metavar="RUN", help="a run's id or name, the beginning of one, or `last`")
    parser.add_argument(
        "--prompts",
        type=positive_int,
        help=f"most validation prompts to answer, spread over the data (default: {DEFAULT_PROMPTS})",
    )
    parser.add_argument(
        "--rows", type=int, default=0, metavar="N", help="also print the first N prompts with both answers"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure again, also where this adapter was measured before"
    )


SUBCOMMANDS = {"evaluate": Subcommand(run, _arguments)}
