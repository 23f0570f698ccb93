"""``chat``: talk to a run's adapter, or to the base."""

from __future__ import annotations

import argparse
import sys

from qlora_tui.cli.verb import Outcome, Verb
from qlora_tui.errors import WRONG_CALL, Problem
from qlora_tui.runs.directory import find


def run(args: argparse.Namespace) -> Outcome | int:
    """One answer with ``--prompt``; a conversation on stdin and stdout without."""
    chosen = find(args.run_id)
    if args.prompt is not None and not args.prompt.strip():
        raise Problem(
            "Nothing was asked",
            what="The prompt is empty.",
            fix="Say something after --prompt, or leave it out for a conversation.",
            exit_code=WRONG_CALL,
        )
    from qlora_tui.chat.ask import answer, converse

    if args.prompt is None:
        converse(chosen, base=args.base, checkpoint=args.checkpoint, thinking=args.thinking)
        return 0
    pieces = answer(chosen, args.prompt, base=args.base, checkpoint=args.checkpoint, thinking=args.thinking)
    if args.json:
        heard = {False: "", True: ""}
        for said in pieces:
            heard[said.thought] += said.text
        data = {"run": chosen.id, "prompt": args.prompt, "answer": heard[False]}
        return Outcome({**data, "thought": heard[True].strip()} if heard[True] else data, text="")
    for said in pieces:
        if not said.thought:
            print(said.text, end="", flush=True)
    sys.stdout.write("\n")
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_id", metavar="RUN", help="a run's id or name, the beginning of one, or `last`")
    parser.add_argument("--prompt", help="ask this and print the answer")
    parser.add_argument("--base", action="store_true", help="talk to the base, without the adapter")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="talk to a checkpoint")
    parser.add_argument(
        "--thinking",
        choices=("auto", "on", "off"),
        default="auto",
        help="have it think before it answers, or not; auto asks as the run was trained",
    )


VERBS = {"chat": Verb(run, _arguments)}
