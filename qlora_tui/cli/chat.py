"""``chat``: talk to a run's adapter or to the base model."""

from __future__ import annotations

import argparse
import sys

from qlora_tui.cli.subcommand import CommandResult, Subcommand
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.runs.directory import find_run


def run(args: argparse.Namespace) -> CommandResult | int:
    """Print one answer with ``--prompt``; without it, hold a conversation on stdin and stdout."""
    chosen = find_run(args.run_id)
    if args.prompt is not None and not args.prompt.strip():
        raise UserError(
            "No question given",
            what="The prompt is empty.",
            fix="Write a question after --prompt, or omit it for a conversation.",
            exit_code=EXIT_USAGE,
        )
    from qlora_tui.chat.repl import generate_once, run_repl

    if args.prompt is None:
        run_repl(chosen, base=args.base, checkpoint=args.checkpoint, thinking=args.thinking)
        return 0
    pieces = generate_once(
        chosen, args.prompt, base=args.base, checkpoint=args.checkpoint, thinking=args.thinking
    )
    if args.json:
        texts = {False: "", True: ""}
        for piece in pieces:
            texts[piece.thought] += piece.text
        data = {"run": chosen.id, "prompt": args.prompt, "answer": texts[False]}
        return CommandResult({**data, "thought": texts[True].strip()} if texts[True] else data, text="")
    for piece in pieces:
        if not piece.thought:
            print(piece.text, end="", flush=True)
    sys.stdout.write("\n")
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_id", metavar="RUN", help="a run's id or name, the beginning of one, or `last`")
    parser.add_argument("--prompt", help="print the answer to this prompt and exit")
    parser.add_argument("--base", action="store_true", help="chat with the base model, without the adapter")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="chat with a checkpoint")
    parser.add_argument(
        "--thinking",
        choices=("auto", "on", "off"),
        default="auto",
        help="turn thinking on or off; auto: as the run was trained",
    )


SUBCOMMANDS = {"chat": Subcommand(run, _arguments, uses_gpu=True)}
