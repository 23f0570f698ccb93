"""``presets``: the shipped presets and the user's."""

from __future__ import annotations

import argparse

import msgspec

from qlora_tui.cli.subcommand import CommandResult, Subcommand, add_json_argument, format_table
from qlora_tui.recipe.fields import fields
from qlora_tui.recipe.presets import find_preset
from qlora_tui.recipe.presets import list_presets as all_presets
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import dump, read_text


def run(args: argparse.Namespace) -> CommandResult:
    """List presets, print the file of one preset, or print every available setting."""
    if args.action == "reference":
        settings = {path: msgspec.to_builtins(field.default) for path, field in fields().items()}
        return CommandResult(data={"settings": settings}, text=dump(Recipe(), comments=True).rstrip())
    if args.action == "show":
        preset = find_preset(args.name)
        return CommandResult(
            data={"name": preset.name, "path": str(preset.path), "recipe": msgspec.to_builtins(preset.layer)},
            text=read_text(preset.path).rstrip(),
        )
    presets = all_presets()
    rows = [
        [p.name, "shipped" if p.shipped else "yours", str(p.problem.what if p.problem else p.note)]
        for p in presets
    ]
    return CommandResult(
        data={
            "presets": [
                {
                    "name": p.name,
                    "note": p.note,
                    "path": str(p.path),
                    "shipped": p.shipped,
                    "problem": str(p.problem) if p.problem else None,
                }
                for p in presets
            ]
        },
        text=format_table(rows, ["preset", "from", "purpose"]),
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        dest="action",
        metavar="show|reference",
        help="without a subcommand, all presets are listed; with a name, that preset is shown",
    )
    show_parser = actions.add_parser("show", help="print one preset, as in its file")
    show_parser.add_argument("name", metavar="NAME", help="a preset from the list")
    reference_parser = actions.add_parser(
        "reference", help="print every setting: default, bounds, and what it does"
    )
    for action in (show_parser, reference_parser):
        add_json_argument(action)


SUBCOMMANDS = {"presets": Subcommand(run, _arguments, changes=())}
