"""``download``: download a model from the hub, or resume a download."""

from __future__ import annotations

import argparse
import sys
import time

from qlora_tui.catalog.download import download
from qlora_tui.cli.subcommand import CommandResult, Subcommand
from qlora_tui.cli.terminal import write_control
from qlora_tui.formatting import format_bytes

_TERMINAL_INTERVAL_S = 0.5
_LOG_INTERVAL_S = 10.0
"""Seconds between progress lines in a file or a pipe, where each update is a separate line."""


def run(args: argparse.Namespace) -> CommandResult:
    """Download the missing files of the model. Raises UserError; downloaded files are always kept."""
    progress = _DownloadProgress()
    resume_command = f"qlora-tui download {args.model}"
    if args.revision != "main":
        resume_command += f" --revision {args.revision}"
    try:
        path = download(args.model, progress.update, revision=args.revision)
    except KeyboardInterrupt:
        progress.end_line()
        print(f"The partial download is kept. Resume it with `{resume_command}`.", file=sys.stderr)
        raise
    finally:
        progress.end_line()
    # A name alone means the main revision.
    name = args.model if args.revision == "main" else str(path)
    return CommandResult(
        data={
            "model": args.model,
            "revision": args.revision,
            "commit": path.name,
            "path": str(path),
            "total_bytes": progress.total_bytes,
        },
        text=f"{args.model} is in {path} ({format_bytes(progress.total_bytes)})\n"
        f"`qlora-tui estimate --model {name}` says whether it fits.",
    )


class _DownloadProgress:
    """Download progress on stderr: one updating line in a terminal, occasional lines elsewhere."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self._is_terminal = sys.stderr.isatty()
        self._printed_s = 0.0
        self._open = False

    def update(self, done: int, total: int, text: str = "") -> None:
        """Show the bytes so far, and the file."""
        self.total_bytes = total
        now_s = time.monotonic()
        if done < total and now_s - self._printed_s < (
            _TERMINAL_INTERVAL_S if self._is_terminal else _LOG_INTERVAL_S
        ):
            return
        self._printed_s = now_s
        line = f"{format_bytes(done)} of {format_bytes(total)}  {text}".rstrip()
        self._open = self._is_terminal
        # Clear to the end of the line: file names differ in length.
        if self._is_terminal:
            write_control(sys.stderr, "\r")
            print(line, end="", file=sys.stderr)
            write_control(sys.stderr, "\x1b[K")
        else:
            print(line, file=sys.stderr)
        sys.stderr.flush()

    def end_line(self) -> None:
        """End the updating line."""
        if self._open:
            print(file=sys.stderr)
            self._open = False


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a Hub id: publisher/name")
    parser.add_argument("--revision", default="main", help="a branch, tag or commit (default: main)")


SUBCOMMANDS = {"download": Subcommand(run, _arguments)}
