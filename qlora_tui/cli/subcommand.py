"""The parts of commands: declarations, arguments, results, and safe output to stdout and stderr.

The only control sequences that reach a terminal are those of this program.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

import msgspec

from qlora_tui.formatting import (
    align_columns,
    format_duration,
    format_loss,
    format_progress,
    truncate_middle,
)
from qlora_tui.visible import visible, visible_in_json

if TYPE_CHECKING:
    from qlora_tui.catalog.architecture_types import Architecture
    from qlora_tui.recipe.schema import Recipe
    from qlora_tui.runs.directory import RunDir
    from qlora_tui.runs.doctor import Check

JSON_HELP = "print one JSON object per line on stdout, and messages on stderr"
_BAR_CELLS = 30
_TERMINAL_INTERVAL_S = 0.2
_LOG_INTERVAL_S = 10.0
"""Seconds between progress lines in a file or a pipe, where each is a separate line."""
GPU_HELP = "GPU to use: number, UUID or part of its name (nvidia-smi -L), auto, or cpu; several with commas"
"""Help of ``--gpu``."""
HOST_HELP = "work on another machine through ssh: a name that `ssh` accepts, such as user@box"
"""Help of ``--host``."""


@dataclass(frozen=True)
class CommandResult:
    """The result of a command, for people and for programs."""

    data: Any
    """Printed with ``--json``. Keys are stable, and bytes are integers."""
    text: str
    """Printed without ``--json``."""
    exit_code: int = 0


@dataclass(frozen=True)
class Subcommand:
    """A command's implementation; :mod:`qlora_tui.cli.main` lists the commands."""

    run: Callable[[argparse.Namespace], CommandResult | int]
    """Runs the command. Returns a result to print, or the exit code if the output is already printed."""
    arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    uses_gpu: bool = False
    """Whether the command has the option ``--gpu``."""
    changes: tuple[str, ...] | None = None
    """Actions and options with which a call starts, writes or deletes something; None if every call does."""
    for_programs: bool = True
    """Whether the command is useful without a person at a terminal."""


def note_description(architecture: Architecture) -> None:
    """Report on stderr that the rest of an architecture will be read, if only an outline of it is known.

    Reading it takes seconds the first time.
    """
    if architecture.is_outline:
        print("reading the model's structure from transformers, once", file=sys.stderr)


def print_result(result: CommandResult, *, as_json: bool) -> int:
    """Print a result on stdout; return its exit code."""
    if as_json:
        print_json(result.data)
    elif result.text:
        print(result.text)
    return result.exit_code


NOW_HELP = "train next, even outside the training hours and while other programs use the GPU"
"""Help of ``--now``, for every command that starts a run."""


def print_json(data: Any) -> None:
    """Print one object on one line, with terminal control characters escaped."""
    try:
        encoded = msgspec.json.encode(data).decode()
    except UnicodeEncodeError:
        # Bytes of a file name that are not UTF-8 become lone surrogates, which must be escaped.
        encoded = json.dumps(msgspec.to_builtins(data))
    sys.stdout.write(visible_in_json(encoded) + "\n")
    sys.stdout.flush()


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` to a subcommand, without a default, which would override the main command's."""
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=JSON_HELP)


def add_gpu_gib_argument(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add ``--gpu-gib``. Subcommands pass ``SUPPRESS`` as ``default``, so that a value given before the
    subcommand is kept.
    """
    parser.add_argument(
        "--gpu-gib",
        type=positive_float,
        default=default,
        metavar="GIB",
        help="estimate for a GPU with this many GiB of memory",
    )


def add_gpu_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--gpu`` to a subcommand, with no default, which would override the command's ``--gpu``."""
    parser.add_argument("--gpu", metavar="GPU", default=argparse.SUPPRESS, help=GPU_HELP)


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``RUN``."""
    parser.add_argument("run_id", metavar="RUN", help="a run's id or name, the beginning of one, or `last`")


def better_weights(run: RunDir, verb: str) -> str:
    """Return a hint on ``--checkpoint`` if a saved checkpoint is notably better than the weights that
    commands use by default; otherwise, return an empty text.

    ``verb``: what the command does with the weights, such as ``export``.
    """
    # Imported here, because light commands load this module and do not need these imports.
    from qlora_tui.chat.chat_sources import checkpoint_name, run_source
    from qlora_tui.runs.result_weights import better_checkpoint
    from qlora_tui.runs.run_summary import summarize

    summary = summarize(run)
    step = better_checkpoint(summary, dict(run.checkpoints()))
    if step is None or summary.best is None:
        return ""
    if next(iter(run_source(run).adapters), None) == checkpoint_name(step):
        return ""
    last_step, last_loss = summary.evaluations[-1]
    return (
        f"The validation loss is {format_loss(summary.best[0])} at step {step:,}, and "
        f"{format_loss(last_loss)} at step {last_step:,}. To {verb} step {step:,} instead: "
        f"--checkpoint {step}"
    )


def input_path(text: str) -> str:
    """Return ``text``. As an argument's type, this function marks an input file, which ``--host`` sends."""
    return text


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that a recipe is built from."""
    parser.add_argument("--preset", help="start from this preset (list them with `qlora-tui presets`)")
    parser.add_argument("--model", help="a Hub id, a folder, or a GGUF file")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        type=input_path,
        metavar="FILE",
        help="a data file; repeatable",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar="KEY=VALUE",
        help="change one setting, as in lora.rank=32; repeatable",
    )


def recipe_from_args(args: argparse.Namespace) -> Recipe:
    """Build a recipe from preset, file and options. Options override the file, and the file overrides the
    preset. Raises UserError.
    """
    # the app loads this module and does not need this import
    from qlora_tui.recipe.layering import build_recipe

    file = getattr(args, "recipe", None)
    return build_recipe(
        preset=args.preset,
        file=Path(file) if file else None,
        sets=args.sets,
        model=args.model,
        data=args.data,
    )


def format_table(rows: list[list[str]], header: list[str]) -> str:
    """Return a table with columns as wide as needed. The caller aligns numbers."""
    return "\n".join(align_columns([header, *rows]))


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    if not whole_number(text):
        raise argparse.ArgumentTypeError("must be a whole number above 0")
    return int(text)


def whole_number(text: str) -> int:
    """Parse an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("must be a whole number, 0 or more")
    return int(text)


def positive_float(text: str) -> float:
    """Parse a positive, finite number, such as a size in GiB."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be a number above 0")
    return value


class VisibleStream:
    """A wrapper of a text stream that writes unsafe characters as symbols.

    All other attributes are those of the wrapped stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""
        """Last character if the next text may continue it, as an emoji can arrive in pieces; else empty."""

    def write(self, text: str) -> int:
        """Write ``text`` with symbols in place of unsafe characters."""
        safe = visible(self._last + text)[len(self._last) :]
        last = text[-1:]
        self._last = "" if last.isascii() or visible(last) != last else last
        self._stream.write(_encodable(safe, self._stream))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each line with symbols in place of unsafe characters."""
        for line in lines:
            self.write(line)

    def write_control(self, sequence: str) -> None:
        """Write one of this program's own control sequences."""
        self._stream.write(sequence)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_missing_streams() -> None:
    """Connect closed standard streams to ``/dev/null``, so that no opened file takes their place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest unused descriptor is this one.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 (for the whole process)


@contextmanager
def visible_output() -> Iterator[None]:
    """Inside the block, write unsafe characters to stdout and stderr as symbols."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = VisibleStream(sys.stdout), VisibleStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def write_control(stream: TextIO, sequence: str) -> None:
    """Write one of this program's own control sequences to stdout or stderr."""
    (stream.write_control if isinstance(stream, VisibleStream) else stream.write)(sequence)


def format_checks(checks: Iterable[Check]) -> list[str]:
    """Return a line for each check, followed by a line with its fix if it has one."""
    lines = []
    for check in checks:
        lines.append(f"{check.outcome:<7}  {check.label}: {_check_text(check)}")
        if check.fix:
            lines.append(f"         ▸ {check.fix}")
    return lines


def checks_as_data(checks: Iterable[Check]) -> list[dict[str, str]]:
    """Return the checks as data for ``--json``."""
    return [
        {"name": check.label, "outcome": check.outcome, "text": _check_text(check), "fix": check.fix}
        for check in checks
    ]


def _check_text(check: Check) -> str:
    return f"{check.text} {check.problem.why}".rstrip() if check.problem else check.text


class ProgressLine:
    """Progress on stderr: a rewritten line in a terminal, otherwise a line from time to time."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._shown_at = -_LOG_INTERVAL_S
        self._first_share: tuple[int, float] | None = None
        """(amount done, monotonic time) when progress was first shown."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def show(self, text: str, *, is_due: bool = False) -> None:
        """Show text, unless a text was shown recently; with ``is_due``, always show it."""
        now = time.monotonic()
        interval_s = _TERMINAL_INTERVAL_S if self._is_terminal else _LOG_INTERVAL_S
        if not is_due and now - self._shown_at < interval_s:
            return
        self._shown_at = now
        if not self._is_terminal:
            print(text, file=sys.stderr, flush=True)
            return
        self.clear()
        # A line that wraps could not be overwritten.
        width = shutil.get_terminal_size().columns - 1
        print(truncate_middle(text, width), end="", file=sys.stderr, flush=True)

    def show_share(self, done: int, total: int, what: str) -> None:
        """Show how many are done and the remaining time; in a terminal, with a bar."""
        text, now = f"{format_progress(done, total)} {what}", time.monotonic()
        self._first_share = self._first_share or (done, now)
        first, began = self._first_share
        if first < done < total:
            text = f"{text}  {format_duration((total - done) * (now - began) / (done - first))} left"
        if self._is_terminal and total:
            text = f"[{'#' * (done * _BAR_CELLS // total):.<{_BAR_CELLS}}] {done / total:.0%}  {text}"
        self.show(text, is_due=done == total)

    def clear(self) -> None:
        """Erase the line, if this is a terminal."""
        if self._is_terminal:
            write_control(sys.stderr, "\r\x1b[K")
            sys.stderr.flush()


def _encodable(text: str, stream: TextIO) -> str:
    # A symbol that the terminal's encoding lacks, as in the C locale, must not end the program.
    if text.isascii():
        return text
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
