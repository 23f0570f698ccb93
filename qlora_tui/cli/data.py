"""``data``: check data files, show their rows, and find the rows that hurt a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from qlora_tui.cli.subcommand import (
    CommandResult,
    ProgressLine,
    Subcommand,
    add_gpu_argument,
    add_json_argument,
    add_run_argument,
    format_table,
    input_path,
    positive_int,
    write_control,
)
from qlora_tui.data.inspection import Report, inspect, show
from qlora_tui.data.problems import NOTES, ON_THINKING, row_outcome
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import EXIT_FAILURE, EXIT_USAGE, UserError
from qlora_tui.formatting import format_loss, pluralize
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.recipe.preference_methods import PAIR_METHODS
from qlora_tui.recipe.schema import Data, Source
from qlora_tui.recipe.toml import to_recipe
from qlora_tui.runs.directory import find_run
from qlora_tui.runs.row_losses import RowLosses, measure_row_losses, read_row_losses

_ROWS_NAMED = 8


def run(args: argparse.Namespace) -> CommandResult | int:
    """Run the action of ``data``. With ``--json``, the fields of an error are also printed to stdout."""
    try:
        if args.action == "show":
            return _show(args)
        if args.action == "inspect":
            return _inspect(args)
        return _blame(args)
    except UserError as problem:
        if not args.json:
            raise
        print(f"qlora-tui: {problem}", file=sys.stderr)
        error = {name: value for name, value in problem.fields().items() if name != "exit_code"}
        return CommandResult(data={"error": error}, text="", exit_code=problem.exit_code)


def _inspect(args: argparse.Namespace) -> CommandResult:
    data = _data(args)
    report = inspect(_source(args), _tokenizer(args), data)
    wrong = any(problem.severity == "error" for problem in report.problems)
    text = _format_report(report, data)
    return CommandResult(msgspec.to_builtins(report), text, exit_code=EXIT_FAILURE if wrong else 0)


def _show(args: argparse.Namespace) -> CommandResult | int:
    tokenizer = _tokenizer(args)
    if tokenizer is None:
        raise UserError(
            "No model",
            what="What a model sees depends on its tokenizer and chat template.",
            fix="Add --model with a model on this machine.",
            exit_code=EXIT_USAGE,
        )
    shown = show(_source(args), args.row, tokenizer, _data(args))
    if args.json:
        return CommandResult(data=msgspec.to_builtins(shown), text="")
    if Path(args.file).is_dir():
        print(shown.path)
    tokens = sum(shown.token_counts)
    sides = shown.sides or ("",) * len(shown.samples)
    for side, pieces, in_loss in zip(sides, shown.samples, shown.trained_counts, strict=True):
        if side:
            print(f"{side}:")
        _print_marked([(piece.text, piece.in_loss) for piece in pieces])
        count = f"\n{in_loss:,} of {tokens:,} tokens are in the loss: those between "
        _print_marked([(count, False), ("these marks", True), (".", False)])
    if shown.refused:
        print(shown.refused)
    for note in shown.notes:
        print(f"note: {NOTES.get(note, note)}")
    return 0


def _blame(args: argparse.Namespace) -> CommandResult:
    run = find_run(args.run_id)
    losses = None if args.again else read_row_losses(run)
    if losses is None:
        with ProgressLine() as line:
            losses = measure_row_losses(
                run, lambda done, total: line.show(f"{done * 100 // max(1, total)}% of the rows measured")
            )
    return CommandResult(data=msgspec.to_builtins(losses), text=_format_losses(losses, args.rows))


def _format_losses(losses: RowLosses, count: int) -> str:
    several = len({row.source for row in losses.rows}) > 1
    rows = [
        [
            f"{row.source + 1}:{row.place}" if several else str(row.place),
            format_loss(row.before),
            format_loss(row.after),
            format_loss(row.other_prompt),
            str(row.tokens),
            row.description,
        ]
        for row in losses.rows[:count]
    ]
    header = ["row", "before", "after", "other prompt", "tokens", "class"]
    classes = ", ".join(f"{number:,} {name}" for name, number in losses.counts().items())
    return (
        f"{pluralize(len(losses.rows), 'row')} of {losses.run}: {classes}.\n"
        "Loss in nats per trained token. The most suspicious rows come first: their answers fit another "
        "row's prompt almost as well as their own.\n" + format_table(rows, header)
    )


def _print_marked(pieces: Iterable[tuple[str, bool]]) -> None:
    """Print a line with trained text bold and underlined, or in brackets if stdout is not a terminal."""
    bold, plain = ("\x1b[1;4m", "\x1b[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    for text, in_loss in pieces:
        if in_loss:
            write_control(sys.stdout, bold)
        print(text, end="")
        if in_loss:
            write_control(sys.stdout, plain)
    print()


def _source(args: argparse.Namespace) -> Source:
    table = {"path": args.file, "format": args.format}
    (source,) = to_recipe({"data": {"sources": [table]}}, origin="the command line").data.sources
    return source


def _data(args: argparse.Namespace) -> Data:
    """Build the data settings from ``--set`` and the other options. Raises UserError."""
    given: dict[str, Any] = {}
    if args.max_length is not None:
        given["max_length"] = args.max_length
    if args.thinking is not None:
        given["thinking"] = args.thinking
    if args.reasoning_not_in_loss:
        given["reasoning_in_loss"] = False
    return msgspec.structs.replace(build_recipe(sets=args.sets).data, **given)


def _tokenizer(args: argparse.Namespace) -> ChatTokenizer | None:
    if not args.model:
        return None
    from qlora_tui.engine.data_service import tokenizer_folder  # the import takes 0.1 s

    chosen = to_recipe({"model": {"chat_template": args.template}}, origin="the command line")
    return ChatTokenizer.from_folder(tokenizer_folder(args.model), chosen.model.chat_template)


def _format_report(report: Report, data: Data) -> str:
    lines = [f"{file.path}: {file.format}, because {'; '.join(file.evidence)}" for file in report.files]
    counts = report.counts
    # Blank lines do not count as rows, so the last of 38 rows may be on line 51.
    by_line = sum(file.last_row for file in report.files) > counts.rows
    numbering = "; rows are numbered by their first line" if by_line else ""
    pairs = data.preferences in PAIR_METHODS and report.template
    used = pluralize(counts.samples, "pair") if pairs else pluralize(counts.conversations, "conversation")
    unused = counts.rows - counts.conversations
    left_out = f", {pluralize(unused, 'row')} left out" if unused else ""
    lines.append(f"{pluralize(counts.rows, 'row')}, {used}{left_out}{numbering}")
    if report.lengths and report.lengths.count:
        length = report.lengths
        lines.append(
            f"length in {length.unit}: 50% up to {length.p50:,}, 90% up to {length.p90:,}, 99% up to "
            f"{length.p99:,}, longest {length.longest:,} (row {length.longest_row:,})"
        )
    if report.too_long:
        lines.append(f"{pluralize(report.too_long, 'row')} longer than the sequence length")
    lines += report.thinking
    lines += [
        f"note: {NOTES.get(note, note)} ({pluralize(rows, 'row')})"
        for note, rows in report.notes.items()
        if note not in ON_THINKING
    ]
    for problem in report.problems:
        rows = ", ".join(f"{row:,}" for row in islice(problem.rows, _ROWS_NAMED))
        more = "…" if problem.count > _ROWS_NAMED else ""
        # Each file of a folder has its own row numbers.
        file = f" of {Path(problem.path).name}" if len(report.files) > 1 else ""
        where = f" ({'row' if len(problem.rows) == 1 else 'rows'} {rows}{more}{file})" if rows else ""
        count = f"{problem.count:,}{where}"
        lines.append(f"{problem.severity}: {problem.title}: {count}{row_outcome(problem, data)}")
        if problem.example:
            lines.append(f"  for example: {problem.example}")
        if problem.fix:
            lines.append(f"  fix: {problem.fix}")
    if not report.problems:
        lines.append("No problems found.")
    return "\n".join(lines)


def _arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="inspect|show|blame", required=True)
    inspect_parser = actions.add_parser("inspect", help="format, counts, lengths and problems of a file")
    blame_parser = actions.add_parser(
        "blame", help="which training rows of a run were learned, and which may be wrong"
    )
    add_run_argument(blame_parser)
    blame_parser.add_argument(
        "--rows", type=positive_int, default=30, metavar="N", help="number of rows to print (default: 30)"
    )
    blame_parser.add_argument(
        "--again", action="store_true", help="measure again even if the rows were measured before"
    )
    add_json_argument(blame_parser)
    add_gpu_argument(blame_parser)
    show_parser = actions.add_parser(
        "show", help="one row as the model sees it, with the tokens to learn marked"
    )
    show_parser.add_argument(
        "--row", type=positive_int, default=1, metavar="N", help="number of the row (default: 1)"
    )
    for action in (inspect_parser, show_parser):
        action.add_argument(
            "file",
            type=input_path,
            metavar="FILE",
            help="a data file, a folder of data files, or a Hub dataset",
        )
        action.add_argument("--model", help="count tokens with this model's tokenizer and chat template")
        action.add_argument(
            "--format", default="auto", help="format of the rows, if detection is wrong, such as alpaca"
        )
        action.add_argument(
            "--template", default="auto", help="chat template for a model without one, such as chatml"
        )
        action.add_argument(
            "--thinking",
            choices=("auto", "on", "off"),
            help="render rows with thinking on or off",
        )
        action.add_argument(
            "--reasoning-not-in-loss", action="store_true", help="keep the reasoning out of the loss"
        )
        action.add_argument(
            "--max-length", type=positive_int, help="sequence length, in tokens (default: 1,024)"
        )
        action.add_argument(
            "--set",
            action="append",
            default=[],
            dest="sets",
            metavar="KEY=VALUE",
            help="change a data setting, as in data.preferences=chosen; repeatable",
        )
        add_json_argument(action)


SUBCOMMANDS = {"data": Subcommand(run, _arguments, uses_gpu=True, changes=("blame",))}
