"""``import``: a recipe from another trainer's file."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import msgspec
import tomli_w

from qlora_tui.cli.subcommand import CommandResult, Subcommand
from qlora_tui.files import write_new
from qlora_tui.formatting import align_columns, pluralize
from qlora_tui.recipe.imported import ImportedRecipe, import_recipe, shown

_LONGEST_VALUE = 40
"""Maximum length of a value in the list of settings without a counterpart."""


def run(args: argparse.Namespace) -> CommandResult:
    """Print or write the recipe, and report on stderr what is omitted."""
    imported = import_recipe(Path(args.file))
    origin = Path(args.file).name
    text = f"# From {origin} ({imported.trainer}).\n\n{tomli_w.dumps(imported.layer)}"
    data = {"recipe": imported.layer, "path": args.output, **msgspec.to_builtins(imported)}
    del data["layer"]
    if not args.json:
        print(_account(imported), file=sys.stderr)
    if args.output is None:
        return CommandResult(data=data, text=text.rstrip())
    write_new(Path(args.output), text.encode())
    next_ = f"qlora-tui train {shlex.quote(args.output)} --dry-run"
    return CommandResult(data=data, text=f"Wrote {args.output}. Check it: {next_}")


def _account(imported: ImportedRecipe) -> str:
    """Return a report on what was read and what was omitted."""
    lines = [
        f"{imported.trainer}: {pluralize(len(imported.taken), 'setting')} read; "
        f"{pluralize(len(imported.unneeded), 'key')} without effect here."
    ]
    if imported.left_out:
        lines.append(f"Keys without a counterpart ({len(imported.left_out)}):")
        rows = [
            [f"  {left.key} = {shown(left.value, _LONGEST_VALUE)}", left.why or "not understood"]
            for left in imported.left_out
        ]
        lines += align_columns(rows)
    if not imported.layer.get("data", {}).get("sources"):
        lines.append("No data was found: specify it with --data, or in data.sources.")
    return "\n".join(lines)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        metavar="FILE",
        help="an axolotl or LLaMA-Factory YAML file, a TRL or Unsloth script (read, not run), or an "
        "adapter folder",
    )
    parser.add_argument("-o", "--output", metavar="RECIPE.toml", help="write the recipe to a new file")


SUBCOMMANDS = {"import": Subcommand(run, _arguments, changes=("output",))}
