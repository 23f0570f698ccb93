"""Declaring commands and printing their results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from qlora_tui.formatting import align_columns
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.recipe.schema import Recipe
from qlora_tui.visible import visible_in_json

JSON_HELP = "print one JSON object per line on stdout, and messages on stderr"


@dataclass(frozen=True)
class CommandResult:
    """A command's result, for people and for programs."""

    data: Any
    """Printed with ``--json``: stable keys, bytes as integers."""
    text: str
    """Printed without ``--json``."""
    exit_code: int = 0


@dataclass(frozen=True)
class Subcommand:
    """A command's implementation; :mod:`qlora_tui.cli.main` lists the commands."""

    run: Callable[[argparse.Namespace], CommandResult | int]
    """Returns a result to print, or the exit code if it has already printed its output."""
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    uses_gpu: bool = False
    """Whether it has the option ``--gpu``."""


def print_result(result: CommandResult, *, as_json: bool) -> int:
    """Print a result on stdout; return its exit code."""
    if as_json:
        print_json(result.data)
    elif result.text:
        print(result.text)
    return result.exit_code


def print_json(data: Any) -> None:
    """Print one object on one line, with terminal control characters escaped."""
    try:
        encoded = msgspec.json.encode(data).decode()
    except UnicodeEncodeError:
        # In a file name that is not UTF-8, bytes become lone surrogates, which must be escaped.
        encoded = json.dumps(msgspec.to_builtins(data))
    sys.stdout.write(visible_in_json(encoded) + "\n")
    sys.stdout.flush()


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` to a subcommand, with no default, which would override the command's ``--json``."""
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=JSON_HELP)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options from which a recipe is built."""
    parser.add_argument("--preset", help="start from this preset (list them with `qlora-tui presets`)")
    parser.add_argument("--model", help="a Hub id, a folder, or a GGUF file")
    parser.add_argument("--data", action="append", default=[], metavar="FILE", help="a data file; repeatable")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar="KEY=VALUE",
        help="change one setting, as in lora.rank=32; repeatable",
    )


def recipe_from_args(args: argparse.Namespace) -> Recipe:
    """Build the recipe the options describe: defaults < preset < file < options. Raises UserError."""
    file = getattr(args, "recipe", None)
    return build_recipe(
        preset=args.preset,
        file=Path(file) if file else None,
        sets=args.sets,
        model=args.model,
        data=args.data,
        on_note=lambda note: print(f"note: {note}", file=sys.stderr),
    )


def format_table(rows: list[list[str]], header: list[str]) -> str:
    """Format columns as wide as needed; the caller aligns numbers."""
    return "\n".join(align_columns([header, *rows]))
