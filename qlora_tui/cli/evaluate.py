"""``evaluate``: what the adapter of a run answers to validation prompts, beside its base."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from qlora_tui.cli.arguments import positive_int, whole_number
from qlora_tui.cli.subcommand import CommandResult, Subcommand
from qlora_tui.cli.terminal import show_in_place
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.runs.directory import find_run
from qlora_tui.runs.harness.harness_evaluation import HarnessResult, harness_lines
from qlora_tui.runs.harness.harness_job import run_harness_tasks
from qlora_tui.runs.task_metrics.task_evaluation import (
    DEFAULT_PROMPTS,
    TaskEvaluation,
    read_task_evaluation,
)
from qlora_tui.runs.task_metrics.task_job import evaluate_task
from qlora_tui.runs.task_metrics.task_report import report_lines


def run(args: argparse.Namespace) -> CommandResult:
    """Print the metrics of a run, after letting base and adapter answer where that was not done."""
    _require_fitting_options(args)
    run = find_run(args.run_id)
    if args.tasks is not None:
        results = run_harness_tasks(run, args.tasks, _print_progress, chat=args.chat)
        print(file=sys.stderr)
        lines = harness_lines(run, results, args.rows)
        return CommandResult(data=[_with_differences(result) for result in results], text="\n".join(lines))
    evaluation = None if args.again else read_task_evaluation(run)
    if evaluation is None or (args.prompts is not None and not _covers(evaluation, args.prompts)):
        evaluation = evaluate_task(run, args.prompts or DEFAULT_PROMPTS, _print_progress)
        print(file=sys.stderr)
    return CommandResult(
        data=_with_differences(evaluation), text="\n".join(report_lines(evaluation, args.rows))
    )


def _require_fitting_options(args: argparse.Namespace) -> None:
    """Raise UserError for an option that would have no effect."""
    if args.chat and args.tasks is None:
        raise UserError(
            "--chat needs --tasks",
            what="Validation prompts are turns of the chat template already.",
            fix="Leave --chat out, or name task files with --tasks.",
            exit_code=EXIT_USAGE,
        )
    if args.prompts is not None and args.tasks is not None:
        raise UserError(
            "--prompts and --tasks exclude each other",
            what="A task asks every row of its data file.",
            fix="Leave --prompts out, and shorten the data file where it takes too long.",
            exit_code=EXIT_USAGE,
        )


def _covers(evaluation: TaskEvaluation, prompts: int) -> bool:
    return len(evaluation.rows) == prompts or len(evaluation.rows) == evaluation.validation_rows < prompts


def _with_differences(evaluation: TaskEvaluation | HarnessResult) -> object:
    data = msgspec.to_builtins(evaluation)
    for metric, values in zip(evaluation.metrics, data["metrics"], strict=True):
        values |= {"difference": metric.difference, "comparison": metric.comparison}
    return data


def _print_progress(done: int, total: int) -> None:
    show_in_place(f"{done:,} of {total:,} answers")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_id", metavar="RUN", help="a run's id or name, the beginning of one, or `last`")
    parser.add_argument(
        "--prompts",
        type=positive_int,
        metavar="N",
        help=f"most validation prompts to answer, spread over the data (default: {DEFAULT_PROMPTS})",
    )
    parser.add_argument(
        "--rows",
        type=whole_number,
        default=0,
        metavar="N",
        help="also print the first N prompts with both answers",
    )
    parser.add_argument(
        "--again", action="store_true", help="measure again, also where this adapter was measured before"
    )
    parser.add_argument(
        "--tasks",
        type=Path,
        metavar="PATH",
        help="instead do tasks of lm-eval with base and adapter: a .yaml file or a folder of them, with rows "
        "in local files (needs the extra lm-eval)",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="with --tasks: write prompts as turns of the chat template, as in training",
    )


SUBCOMMANDS = {"evaluate": Subcommand(run, _arguments, uses_gpu=True)}
