"""``presets``: the shipped ones and the user's."""

from __future__ import annotations

import argparse

import msgspec

from qlora_tui.cli.verb import Outcome, Verb, json_argument, table
from qlora_tui.recipe.fields import fields
from qlora_tui.recipe.presets import find_preset
from qlora_tui.recipe.presets import list_presets as all_presets
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import dump, read_text


def run(args: argparse.Namespace) -> Outcome:
    """List presets, show one as its file has it, or every setting there is."""
    if args.action == "reference":
        settings = {path: msgspec.to_builtins(field.default) for path, field in fields().items()}
        return Outcome(data={"settings": settings}, text=dump(Recipe(), comments=True).rstrip())
    if args.action == "show":
        preset = find_preset(args.name)
        return Outcome(
            data={"name": preset.name, "path": str(preset.path), "recipe": msgspec.to_builtins(preset.layer)},
            text=read_text(preset.path).rstrip(),
        )
    found = all_presets()
    rows = [
        [p.name, "shipped" if p.shipped else "yours", str(p.problem.what if p.problem else p.note)]
        for p in found
    ]
    return Outcome(
        data={
            "presets": [
                {
                    "name": p.name,
                    "note": p.note,
                    "path": str(p.path),
                    "shipped": p.shipped,
                    "problem": str(p.problem) if p.problem else None,
                }
                for p in found
            ]
        },
        text=table(rows, ["preset", "from", "what for"]),
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="show|reference")
    one = actions.add_parser("show", help="print one preset")
    one.add_argument("name", metavar="NAME")
    every = actions.add_parser("reference", help="print every setting: default, bounds, and what it does")
    for action in (one, every):
        json_argument(action)


VERBS = {"presets": Verb(run, _arguments)}
