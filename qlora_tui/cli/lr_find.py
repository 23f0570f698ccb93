"""``lr-find``: try rising learning rates on a recipe, and suggest one."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import msgspec

from qlora_tui.cli.arguments import learning_rate, positive_int
from qlora_tui.cli.subcommand import (
    CommandResult,
    Subcommand,
    add_recipe_arguments,
    format_table,
    recipe_from_args,
)
from qlora_tui.cli.terminal import show_in_place
from qlora_tui.cli.train import report_checks
from qlora_tui.data.sources import every_source, paths_of
from qlora_tui.recipe.conflicts import require_runnable
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.lr_range import MANY_EPOCHS, LrRange, RangeSettings, at_learning_rate
from qlora_tui.runs.lr_range_job import measure_lr_range, read_stored
from qlora_tui.runs.lr_suggestion import METHOD, RangeCurve, format_rate, read_curve
from qlora_tui.runs.machine_checks import read_machine
from qlora_tui.runs.preflight import preflight

_DEFAULTS = RangeSettings()
_ROWS = 20
"""About how many steps are printed."""


def run(args: argparse.Namespace) -> CommandResult:
    """Print the test of a recipe, after measuring it where that was not done with these rates and steps."""
    recipe = recipe_from_args(args)
    require_runnable(recipe)
    settings = RangeSettings(low=args.low, high=args.high, steps=args.steps)
    settings.check()
    for source in every_source(recipe.data):
        paths_of(source)  # downloads a Hub dataset, so that its rows can be checked
    lr_range = None if args.again else read_stored(recipe)
    if lr_range is None or lr_range.settings != settings:
        report_checks(preflight(_without_length(recipe), read_machine(), read_columnar=True))
        lr_range = measure_lr_range(recipe, settings, _print_progress)
        if sys.stderr.isatty():
            print(file=sys.stderr)
    curve = read_curve(lr_range)
    return CommandResult(data=_as_data(lr_range, curve), text=_as_text(lr_range, curve, recipe))


def _without_length(recipe: Recipe) -> Recipe:
    """The recipe without what the test replaces, on which checks would only give advice for a run."""
    for path, value in (
        ("training.learning_rate", Recipe().training.learning_rate),
        ("training.max_steps", 0),
        ("training.epochs", MANY_EPOCHS),
    ):
        recipe = replace_setting(recipe, path, value)
    return recipe


def _print_progress(done: int, total: int, so_far: LrRange) -> None:
    half = total // 2
    text = f"{done:,} of {half:,} batches before training"
    if so_far.steps:
        text = f"step {len(so_far.steps):,} of {half:,} at {format_rate(so_far.steps[-1].rate)}"
    show_in_place(f"{text:<44}")


def _as_data(lr_range: LrRange, curve: RangeCurve) -> dict[str, Any]:
    data: dict[str, Any] = msgspec.to_builtins(lr_range)
    return {
        "suggested": curve.suggested,
        "sentence": curve.sentence,
        "method": METHOD,
        "rates": curve.rates,
        "losses": curve.losses,
        "smoothed": curve.smoothed,
        **data,
    }


def _as_text(lr_range: LrRange, curve: RangeCurve, recipe: Recipe) -> str:
    every = max(1, len(curve.rates) // _ROWS)
    shown = [i for i in range(len(curve.rates)) if i % every == 0 or i == curve.lowest]
    rows = [
        [
            f"{format_rate(curve.rates[i]):>8}",
            f"{curve.smoothed[i]:.3f}",
            "lowest" if i == curve.lowest else "",
        ]
        for i in shown
    ]
    ended = ", ended where the loss diverged" if lr_range.diverged else ""
    lines = [
        format_table(rows, ["    rate", "loss", ""]),
        "",
        f"{len(lr_range.steps)} of {lr_range.settings.steps} steps in {lr_range.seconds:.0f} s{ended}.",
        curve.sentence,
    ]
    if curve.suggested is not None:
        use = f"Use it with --set training.learning_rate={format_rate(curve.suggested)}"
        if embedding_rate := at_learning_rate(recipe, curve.suggested).training.embedding_learning_rate:
            use += f" --set training.embedding_learning_rate={format_rate(embedding_rate)}"
        lines.append(use)
    return "\n".join(lines)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.toml", help="a recipe file")
    add_recipe_arguments(parser)
    parser.add_argument(
        "--from",
        dest="low",
        type=learning_rate,
        default=_DEFAULTS.low,
        metavar="RATE",
        help="rate of the first step (default: 1e-6)",
    )
    parser.add_argument(
        "--to",
        dest="high",
        type=learning_rate,
        default=_DEFAULTS.high,
        metavar="RATE",
        help="rate of the last step (default: 0.1); the test ends earlier where the loss diverges",
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        default=_DEFAULTS.steps,
        metavar="N",
        help=f"optimizer steps between both (default: {_DEFAULTS.steps})",
    )
    parser.add_argument(
        "--again", action="store_true", help="measure again, also where this recipe was measured before"
    )


SUBCOMMANDS = {"lr-find": Subcommand(run, _arguments, uses_gpu=True)}
