"""``qlora-tui``: reads the words, runs the verb, and turns what went wrong into a sentence."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence

import msgspec

from qlora_tui import __version__, paths
from qlora_tui.cli import chat, data, demo, doctor, estimate, locate, models, presets, runs, train
from qlora_tui.cli.verb import Verb, show
from qlora_tui.errors import FAILED, Problem
from qlora_tui.settings import load_settings

VERBS: tuple[Verb, ...] = (
    models.VERB,
    estimate.VERB,
    data.VERB,
    presets.VERB,
    train.VERB,
    *runs.VERBS,
    chat.VERB,
    doctor.VERB,
    demo.VERB,
    locate.VERB,
)

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. 0 done, 1 failed, 2 the call was wrong."""
    args = _parser().parse_args(argv)
    try:
        if args.verb is None:
            return _open_app(args)
        outcome = args.run(args)
        return outcome if isinstance(outcome, int) else show(outcome, as_json=args.json)
    except Problem as problem:
        print(f"qlora-tui: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read us (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        return _report_bug(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlora-tui",
        description="Fine-tune language models with QLoRA on one GPU. Without a verb it opens the app.",
    )
    parser.add_argument("--version", action="version", version=f"qlora-tui {__version__}")
    parser.add_argument("--gpu-gib", type=float, help="estimate against a card of this size")
    parser.add_argument("--no-mouse", action="store_true", help="leave the mouse to the terminal")
    parser.set_defaults(verb=None)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for verb in VERBS:
        sub = verbs.add_parser(verb.name, help=verb.help, description=verb.help)
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout, messages on stderr")
        verb.arguments(sub)
        sub.set_defaults(run=verb.run)
    return parser


def _open_app(args: argparse.Namespace) -> int:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Problem(
            "No terminal",
            what="The app needs a terminal, and there is none here.",
            fix="Use a verb: `qlora-tui --help` lists them.",
            exit_code=2,
        )
    from qlora_tui.tui.app import QloraApp

    settings = load_settings()
    if args.gpu_gib:
        settings = msgspec.structs.replace(settings, card_gib=args.gpu_gib)
    app = QloraApp(settings)
    app.run(mouse=settings.mouse and not args.no_mouse)
    return app.return_code or 0


def _report_bug(error: Exception) -> int:
    log = paths.state_dir() / "qlora-tui.log"
    with log.open("a") as file:
        file.write(time.strftime("%Y-%m-%d %H:%M:%S\n"))
        traceback.print_exception(error, file=file)
    print(
        f"qlora-tui: A mistake of ours: {type(error).__name__}: {error}\n  The traceback is in {log}.",
        file=sys.stderr,
    )
    return FAILED
