"""``chat``: chat with a run's adapter or its base; ``evaluate``: let both answer validation prompts."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

import msgspec

from qlora_tui.cli.subcommand import (
    CommandResult,
    ProgressLine,
    Subcommand,
    add_run_argument,
    better_weights,
    positive_int,
    whole_number,
)
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.runs.directory import RunDir, find_run
from qlora_tui.runs.task_metrics.decisions import MOST_DECISIONS
from qlora_tui.runs.task_metrics.task_evaluation import (
    DEFAULT_PROMPTS,
    TaskEvaluation,
    evaluate_task,
    read_task_evaluation,
    report_lines,
)

_BENCHMARK_PORT = 8000


def run_chat(args: argparse.Namespace) -> CommandResult | int:
    """Print one answer to ``--prompt``; without this option, hold a conversation on stdin and stdout."""
    chosen = find_run(args.run_id)
    if args.prompt is not None and not args.prompt.strip():
        raise UserError(
            "No question given",
            what="The prompt is empty.",
            fix="Write a question after --prompt, or omit --prompt for a conversation.",
            exit_code=EXIT_USAGE,
        )
    from qlora_tui.chat.chat_types import GREEDY, Sampling
    from qlora_tui.chat.repl import generate_once, run_repl

    if args.checkpoint is None and not args.base and (note := better_weights(chosen, "chat with")):
        print(note, file=sys.stderr)
    sampling = GREEDY if args.greedy else Sampling(seed=args.seed)
    who: dict[str, Any] = {"base": args.base, "checkpoint": args.checkpoint, "thinking": args.thinking}
    if args.prompt is None:
        run_repl(chosen, **who, sampling=sampling)
        return 0
    pieces = generate_once(chosen, args.prompt, **who, sampling=sampling)
    if args.json:
        texts = {False: "", True: ""}
        for piece in pieces:
            texts[piece.thought] += piece.text
        data: dict[str, Any] = {"run": chosen.id, "prompt": args.prompt, "answer": texts[False]}
        data["sampling"] = msgspec.structs.asdict(sampling)
        return CommandResult({**data, "thought": texts[True].strip()} if texts[True] else data, text="")
    for piece in pieces:
        if not piece.thought:
            print(piece.text, end="", flush=True)
    sys.stdout.write("\n")
    return 0


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("--prompt", help="print the answer to this prompt and exit")
    parser.add_argument("--base", action="store_true", help="chat with the base model, without the adapter")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="chat with a checkpoint")
    reproducible = parser.add_mutually_exclusive_group()
    reproducible.add_argument(
        "--greedy", action="store_true", help="always take the most likely token: the same answer each time"
    )
    reproducible.add_argument(
        "--seed",
        type=_seed,
        metavar="N",
        help="seed for sampling: on one machine, the same seed gives the same answer",
    )
    parser.add_argument(
        "--thinking",
        choices=("auto", "on", "off"),
        default="auto",
        help="turn thinking on or off; auto: as the run was trained",
    )


def _seed(text: str) -> int:
    """Parse a seed for torch's random numbers."""
    seed = whole_number(text)
    if seed >= 2**32:
        raise argparse.ArgumentTypeError("must be below 2^32")
    return seed


def run_evaluate(args: argparse.Namespace) -> CommandResult:
    """Return the metrics of a run, to be printed.

    Base and adapter answer first if there is no stored evaluation for ``--prompts``, or with ``--again``.
    """
    run = find_run(args.run_id)
    evaluation = None if args.again else read_task_evaluation(run)
    if evaluation is None or (args.prompts is not None and not _covers(evaluation, args.prompts)):
        with ProgressLine() as line:
            evaluation = evaluate_task(
                run,
                args.prompts,
                lambda done, total: line.show_share(done, total, "answers"),
            )
    lines = [
        *report_lines(evaluation, args.rows),
        "",
        *_lm_eval_lines(run),
    ]
    return CommandResult(data=_with_differences(evaluation), text="\n".join(lines))


def _covers(evaluation: TaskEvaluation, prompts: int) -> bool:
    return len(evaluation.rows) == prompts or len(evaluation.rows) == evaluation.validation_rows < prompts


def _with_differences(evaluation: TaskEvaluation) -> object:
    data = msgspec.to_builtins(evaluation)
    for metric, values in zip(evaluation.metrics, data["metrics"], strict=True):
        values |= {"difference": metric.difference, "comparison": metric.comparison}
    return data


def _lm_eval_lines(run: RunDir) -> list[str]:
    """Return lines on how EleutherAI's lm-evaluation-harness measures a run through a server.

    The options are those of lm-eval 0.4.13, ``lm_eval/models/api_models.py``.
    """
    model = {
        "model": run.id,
        "base_url": f"http://127.0.0.1:{_BENCHMARK_PORT}/v1/completions",
        "tokenizer": run.adapter_dir,
        "num_concurrent": 8,
    }
    arguments = shlex.quote(",".join(f"{name}={value}" for name, value in model.items()))
    return [
        "For benchmarks, with lm-eval (model=base measures the base):",
        f"  qlora-tui serve {shlex.quote(run.id)} --port {_BENCHMARK_PORT} --background",
        f"  lm_eval --model local-completions --model_args {arguments} --tasks TASKS",
    ]


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument(
        "--prompts",
        type=positive_int,
        metavar="N",
        help="maximum number of validation prompts to answer, spread over the data (default: "
        f"{DEFAULT_PROMPTS}; {MOST_DECISIONS:,} if the answers are labels)",
    )
    parser.add_argument(
        "--rows",
        type=whole_number,
        default=0,
        metavar="N",
        help="also print the first N prompts with both answers",
    )
    parser.add_argument(
        "--again", action="store_true", help="measure again even if this adapter was measured before"
    )


SUBCOMMANDS = {
    "chat": Subcommand(run_chat, _chat_arguments, uses_gpu=True),
    "evaluate": Subcommand(run_evaluate, _evaluate_arguments, uses_gpu=True),
}
