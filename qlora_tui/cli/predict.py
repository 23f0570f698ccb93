"""``predict``: the label of each row of a file, as a run's adapter predicts it."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from qlora_tui.chat.prediction import Predicted, Prediction, check_prediction
from qlora_tui.cli.subcommand import CommandResult, ProgressLine, Subcommand, input_path
from qlora_tui.formatting import format_path, pluralize
from qlora_tui.runs.directory import find_run
from qlora_tui.worker import run_job


def run_predict(args: argparse.Namespace) -> CommandResult:
    """Predict the label of each row of a file, and show the progress. A separate process does the work."""
    request = Prediction(
        run=str(find_run(args.run_id).path),
        file=str(Path(args.file).absolute()),
        out=str(args.out.absolute()),
        columns=dict(args.column),
        threshold=args.threshold,
        probabilities=args.probabilities,
        replaces=args.replace,
    )
    check_prediction(request)
    with ProgressLine() as line:
        line.show("loading the model", is_due=True)
        predicted = run_job(
            "qlora_tui.chat.prediction:predict",
            request,
            result=Predicted,
            title="The prediction failed",
            subject="The process that predicts the labels",
            fix="Run the same command again: it continues with the remaining rows.",
            on_progress=lambda progress: line.show_share(progress.done, progress.total, "rows"),
        )
    return CommandResult(msgspec.to_builtins(predicted), "\n".join(_lines(predicted)))


def _lines(predicted: Predicted) -> list[str]:
    lines = [f"{pluralize(predicted.rows, 'row')} written to {format_path(Path(predicted.out))}."]
    if predicted.resumed:
        lines.append(f"{pluralize(predicted.resumed, 'row')} had already been predicted.")
    if predicted.abstained:
        lines.append(f"{pluralize(predicted.abstained, 'row')} left to a person: below the threshold.")
    if predicted.undecided:
        lines.append(
            f"{pluralize(predicted.undecided, 'row')} could not be predicted: the column predicted_problem "
            f"says why."
        )
    return lines


def _column(text: str) -> tuple[str, str]:
    part, equals, column = text.partition("=")
    if not equals or not part or not column:
        raise argparse.ArgumentTypeError("must be PART=COLUMN, as in text=body")
    return part, column


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be a probability from 0 to 1")
    return value


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=input_path, metavar="FILE", help="CSV, JSON, JSONL, Parquet or Arrow")
    parser.add_argument(
        "--run",
        required=True,
        dest="run_id",
        metavar="RUN",
        help="run whose adapter predicts: an id or name, the beginning of one, or `last`",
    )
    parser.add_argument(
        "-o", "--out", required=True, type=Path, metavar="OUT", help="a .csv, .jsonl or .parquet file"
    )
    parser.add_argument(
        "--threshold",
        type=_share,
        metavar="P",
        help="leave rows whose label is less probable than this to a person (`evaluate` lists thresholds)",
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="also write the probability of every label"
    )
    parser.add_argument(
        "--column",
        type=_column,
        action="append",
        default=[],
        metavar="PART=COLUMN",
        help="name the column for a part if it differs from training, as in text=body; repeatable",
    )
    parser.add_argument(
        "--replace", action="store_true", help="replace OUT, and restart an unfinished prediction"
    )


SUBCOMMANDS = {"predict": Subcommand(run_predict, _predict_arguments, uses_gpu=True)}
