"""``chat``: talk to a run's adapter or to the base model."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import msgspec

from qlora_tui.cli.arguments import whole_number
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
    from qlora_tui.chat.chat_types import GREEDY, Sampling
    from qlora_tui.chat.repl import generate_once, run_repl

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


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_id", metavar="RUN", help="a run's id or name, the beginning of one, or `last`")
    parser.add_argument("--prompt", help="print the answer to this prompt and exit")
    parser.add_argument("--base", action="store_true", help="chat with the base model, without the adapter")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="chat with a checkpoint")
    reproducible = parser.add_mutually_exclusive_group()
    reproducible.add_argument(
        "--greedy", action="store_true", help="always take the most likely token: the same answer each time"
    )
    reproducible.add_argument(
        "--seed", type=_seed, metavar="N", help="draw tokens from this seed: the same answer on one machine"
    )
    parser.add_argument(
        "--thinking",
        choices=("auto", "on", "off"),
        default="auto",
        help="turn thinking on or off; auto: as the run was trained",
    )


def _seed(text: str) -> int:
    """Parse a seed of torch's random numbers."""
    seed = whole_number(text)
    if seed >= 2**32:
        raise argparse.ArgumentTypeError("it must be below 2^32")
    return seed


SUBCOMMANDS = {"chat": Subcommand(run, _arguments, uses_gpu=True)}
