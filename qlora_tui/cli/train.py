"""``train``: queue a run, and follow it unless told otherwise."""

from __future__ import annotations

import argparse
import sys

from qlora_tui.catalog.local import resolve
from qlora_tui.cli.follow import follow
from qlora_tui.cli.verb import Outcome, Verb, recipe_arguments, recipe_from
from qlora_tui.data.sources import open_source
from qlora_tui.recipe.conflicts import ready_to_run
from qlora_tui.runs import actions


def run(args: argparse.Namespace) -> Outcome | int:
    """Queue the run and see that a runner is at work."""
    recipe = recipe_from(args)
    ready_to_run(recipe)
    # What the trainer would refuse in ten seconds is refused now.
    resolve(recipe.model.id)
    for source in recipe.data.sources:
        open_source(source)
    new = actions.submit(recipe)
    if args.detach:
        return Outcome(
            data={"run": new.id, "path": str(new.path)},
            text=f"{new.id} is queued. `qlora-tui attach {new.id}` follows it.",
        )
    print(f"{new.id} (Ctrl-C detaches; the run goes on)", file=sys.stderr)
    return follow(new, as_json=args.json)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.toml", help="a recipe file")
    recipe_arguments(parser)
    parser.add_argument("--detach", action="store_true", help="return at once; the run goes on by itself")


VERBS = {"train": Verb(run, _arguments)}
