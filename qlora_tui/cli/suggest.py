"""``suggest``: settings for a model and data, each with its reason."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from pathlib import Path
from typing import Any

from qlora_tui.cli.subcommand import (
    CommandResult,
    ProgressLine,
    Subcommand,
    add_gpu_gib_argument,
    add_recipe_arguments,
    recipe_from_args,
)
from qlora_tui.files import write_new
from qlora_tui.formatting import GIB
from qlora_tui.recipe.fields import replace_settings
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import dump_overrides
from qlora_tui.runs.doctor import read_machine
from qlora_tui.runs.suggestion_facts import read_facts
from qlora_tui.runs.suggestions import Suggestion, suggest

_WIDTH = 100
"""Width of the lines of a reason, in characters."""


def run(args: argparse.Namespace) -> CommandResult:
    """Print a suggestion for each setting; with ``-o``, write the suggested recipe. Raises UserError."""
    recipe = recipe_from_args(args)
    machine = read_machine(None if args.gpu_gib is None else round(args.gpu_gib * GIB))
    with ProgressLine() as line:
        facts = read_facts(
            recipe, machine, lambda progress: line.show(f"{progress.done}% of the samples counted")
        )
    suggestions = suggest(facts)
    changes: dict[str, Any] = {}
    for suggestion in suggestions:
        changes |= suggestion.changes
        recipe = replace_settings(recipe, suggestion.changes)
    if args.output is not None:
        write_new(Path(args.output), _with_reasons(recipe, suggestions).encode())
    return CommandResult(
        data={
            "suggestions": [_as_data(suggestion) for suggestion in suggestions],
            "changes": changes,
            "samples_are_counted": facts.known.is_exact,
            "free_bytes": facts.free_bytes,
            "path": args.output,
        },
        text="\n".join([*_lines(suggestions), "", _next(args, changes)]),
    )


def _with_reasons(recipe: Recipe, suggestions: tuple[Suggestion, ...]) -> str:
    """Return the recipe as TOML, with the changes and their reasons in comments at the top."""
    changed = (f"# {one.label} {one.change}: {one.sourced_reason}\n" for one in suggestions if one.changes)
    return f"{''.join(changed)}{dump_overrides(recipe, Recipe())}"


def _as_data(suggestion: Suggestion) -> dict[str, Any]:
    return {
        "setting": suggestion.label,
        "now": suggestion.now,
        "suggested": suggestion.then,
        "known": suggestion.is_known,
        "changes": dict(suggestion.changes),
        "reason": suggestion.reason,
        "sources": [{"name": each.name, "url": each.url} for each in suggestion.references],
    }


def _lines(suggestions: tuple[Suggestion, ...]) -> list[str]:
    """Return a line for each suggestion, followed by its reason."""
    label = max(len(suggestion.label) for suggestion in suggestions)
    lines = []
    for suggestion in suggestions:
        lines.append(f"{suggestion.label:<{label}}  {suggestion.change}")
        lines += textwrap.wrap(
            suggestion.sourced_reason, _WIDTH, initial_indent="    ", subsequent_indent="    "
        )
    return lines


def _next(args: argparse.Namespace, changes: dict[str, Any]) -> str:
    """Return a sentence about how to use the suggestions."""
    if args.output is not None:
        return f"Wrote {args.output}. Check it: qlora-tui train {shlex.quote(args.output)} --dry-run"
    if not changes:
        return "Nothing to change."
    sets = " ".join(f"--set {path}={value}" for path, value in changes.items())
    return (
        f"Nothing was changed. Write a recipe with -o RECIPE.toml, or pass these options to `qlora-tui "
        f"train`: {sets}"
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.toml", help="a recipe file")
    add_recipe_arguments(parser)
    add_gpu_gib_argument(parser, default=argparse.SUPPRESS)
    parser.add_argument(
        "-o", "--output", metavar="RECIPE.toml", help="write the recipe with the suggestions to a new file"
    )


SUBCOMMANDS = {"suggest": Subcommand(run, _arguments, uses_gpu=True, changes=("output",))}
