"""``download``: a model from the hub, or the rest of one."""

from __future__ import annotations

import argparse
import sys
import time

from qlora_tui.catalog.download import download
from qlora_tui.cli.terminal import control
from qlora_tui.cli.verb import Outcome, Verb
from qlora_tui.format import size

_EVERY_S = 0.5
_EVERY_UNSEEN_S = 10.0
"""Into a file or a pipe, where each word is a line of its own."""


def run(args: argparse.Namespace) -> Outcome:
    """Fetch what is missing of the model. Raises Problem; what was fetched is kept in any case."""
    progress = _Progress()
    again = f"qlora-tui download {args.model}"
    if args.revision != "main":
        again += f" --revision {args.revision}"
    try:
        path = download(args.model, progress.tell, revision=args.revision)
    except KeyboardInterrupt:
        progress.end()
        print(f"What was fetched is kept: `{again}` goes on from there.", file=sys.stderr)
        raise
    finally:
        progress.end()
    # Where a name alone is given, the main revision is meant.
    name = args.model if args.revision == "main" else str(path)
    return Outcome(
        data={
            "model": args.model,
            "revision": args.revision,
            "commit": path.name,
            "path": str(path),
            "total_bytes": progress.total_bytes,
        },
        text=f"{args.model} is in {path} ({size(progress.total_bytes)})\n"
        f"`qlora-tui estimate --model {name}` says whether it fits.",
    )


class _Progress:
    """How far it is, on stderr: one line that changes in a terminal, else a line now and then."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self._seen = sys.stderr.isatty()
        self._told_s = 0.0
        self._open = False

    def tell(self, done_bytes: int, total_bytes: int, file: str) -> None:
        self.total_bytes = total_bytes
        now_s = time.monotonic()
        if done_bytes < total_bytes and now_s - self._told_s < (_EVERY_S if self._seen else _EVERY_UNSEEN_S):
            return
        self._told_s = now_s
        words = f"{size(done_bytes)} of {size(total_bytes)}  {file}".rstrip()
        self._open = self._seen
        # Clear to the end of the line: file names differ in length.
        if self._seen:
            control(sys.stderr, "\r")
            print(words, end="", file=sys.stderr)
            control(sys.stderr, "\x1b[K")
        else:
            print(words, file=sys.stderr)
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the line that changed."""
        if self._open:
            print(file=sys.stderr)
            self._open = False


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a hub id: publisher/name")
    parser.add_argument("--revision", default="main", help="a branch, tag or commit (default: main)")


VERBS = {"download": Verb(run, _arguments)}
