"""How a verb is declared, and how its outcome is printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from qlora_tui.recipe.layering import build_recipe
from qlora_tui.recipe.schema import Recipe
from qlora_tui.visible import visible_in_json

JSON_HELP = "JSON on stdout, an object a line; messages on stderr"


@dataclass(frozen=True)
class CommandResult:
    """What a verb found: the same for people and for programs."""

    data: Any
    """Printed with ``--json``: stable keys, bytes as integers."""
    text: str
    """Printed without."""
    exit_code: int = 0


@dataclass(frozen=True)
class Subcommand:
    """What a word of the command line does; :mod:`qlora_tui.cli.main` has the words."""

    run: Callable[[argparse.Namespace], CommandResult | int]
    """Gives an outcome to print, or the exit code when it has printed as it went."""
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def print_result(result: CommandResult, *, as_json: bool) -> int:
    """Print an outcome on stdout; its exit code."""
    if as_json:
        print_json(result.data)
    elif result.text:
        print(result.text)
    return result.exit_code


def print_json(data: Any) -> None:
    """Print one object on one line; what a terminal would obey is escaped in it."""
    try:
        encoded = msgspec.json.encode(data).decode()
    except UnicodeEncodeError:
        # A file name that is not UTF-8: its bytes become lone surrogates, which only an escape can hold.
        encoded = json.dumps(msgspec.to_builtins(data))
    sys.stdout.write(visible_in_json(encoded) + "\n")
    sys.stdout.flush()


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """``--json`` of a verb's action: unlike the verb's own it has no default, which would undo that one."""
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=JSON_HELP)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The options from which a recipe is laid together."""
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
    """The recipe the options describe: defaults < preset < file < options. Raises UserError."""
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
    """Columns as wide as they need; numbers are told by the caller's own alignment."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)
