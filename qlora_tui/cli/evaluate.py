"""``evaluate``: what the adapter of a run answers to validation prompts, beside its base."""

from __future__ import annotations

import argparse
import shlex
import sys

import msgspec

from qlora_tui.cli.arguments import positive_int, whole_number
from qlora_tui.cli.subcommand import CommandResult, Subcommand
from qlora_tui.cli.terminal import show_in_place
from qlora_tui.runs.directory import RunDir, find_run
from qlora_tui.runs.task_metrics.task_evaluation import (
    DEFAULT_PROMPTS,
    TaskEvaluation,
    evaluate_task,
    read_task_evaluation,
    report_lines,
)


def run(args: argparse.Namespace) -> CommandResult:
    """Print the metrics of a run, after letting base and adapter answer where that was not done."""
    run = find_run(args.run_id)
    evaluation = None if args.again else read_task_evaluation(run)
    if evaluation is None or (args.prompts is not None and not _covers(evaluation, args.prompts)):
        evaluation = evaluate_task(run, args.prompts or DEFAULT_PROMPTS, _print_progress)
        print(file=sys.stderr)
    lines = [*report_lines(evaluation, args.rows), "", "For benchmarks, with lm-eval:", *_lm_eval_lines(run)]
    return CommandResult(data=_with_differences(evaluation), text="\n".join(lines))


def _covers(evaluation: TaskEvaluation, prompts: int) -> bool:
    return len(evaluation.rows) == prompts or len(evaluation.rows) == evaluation.validation_rows < prompts


def _with_differences(evaluation: TaskEvaluation) -> object:
    data = msgspec.to_builtins(evaluation)
    for metric, values in zip(evaluation.metrics, data["metrics"], strict=True):
        values |= {"difference": metric.difference, "comparison": metric.comparison}
    return data


def _lm_eval_lines(run: RunDir) -> list[str]:
    """Return the commands with which EleutherAI's lm-evaluation-harness measures a run's adapter.

    The base is not quantized: lm-eval 0.4.13 passes ``load_in_4bit`` to ``from_pretrained``, which takes none
    in transformers 5.
    """
    recipe = run.recipe()
    if recipe.model.id.endswith(".gguf"):
        # transformers converts such a base in another way than a run does.
        return [
            f"  qlora-tui export merge {run.id} MERGED",
            "  lm_eval --model hf --model_args pretrained=MERGED --tasks TASKS",
        ]
    model = f"pretrained={recipe.model.id},peft={run.adapter_dir},dtype={recipe.quantization.compute_dtype}"
    return [f"  lm_eval --model hf --model_args {shlex.quote(model)} --tasks TASKS"]


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


SUBCOMMANDS = {"evaluate": Subcommand(run, _arguments, uses_gpu=True)}
