"""``export recipe``: a recipe and its rows for another trainer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.cli.subcommand import CommandResult, ProgressLine, add_json_argument, input_path
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.written_rows import TRAIN, VALIDATION, WrittenRows, write_rows
from qlora_tui.export.unfinished_files import draft_folder, publish_new, refuse_existing
from qlora_tui.formatting import align_columns
from qlora_tui.recipe.exported import ExportedRecipe, export_recipe
from qlora_tui.recipe.fields import format_value
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import find_run

_NEXT = {"axolotl": "axolotl train axolotl.yml", "script": "python train.py"}


def run(args: argparse.Namespace) -> CommandResult:
    """Write the folder, and report on stderr what is omitted."""
    out: Path = args.out.expanduser().absolute()
    refuse_existing(out)
    recipe = recipe_or_run(args.recipe)
    tokenizer = ChatTokenizer.from_folder(resolve_model(recipe.model.id).folder, recipe.model.chat_template)
    with ProgressLine() as line:
        prepared = prepare_dataset(recipe, tokenizer, lambda done: line.show(f"reading rows: {done.rows:,}"))
    with draft_folder(out) as draft:
        folder = draft / "recipe"
        folder.mkdir(mode=0o755)
        rows = write_rows(recipe, prepared, tokenizer.traits, folder)
        exported = export_recipe(recipe, args.target, (TRAIN, VALIDATION) if rows.validation else (TRAIN,))
        (folder / exported.name).write_text(exported.text, encoding="utf-8")
        publish_new(folder, out)
    if not args.json:
        print(_account(rows, exported), file=sys.stderr)
    data = {"path": str(out), **msgspec.to_builtins(rows), "left_out": msgspec.to_builtins(exported.left_out)}
    return CommandResult(data, f"Wrote {out}. Train there: {_NEXT[args.target]}")


def add_arguments(form: argparse.ArgumentParser) -> None:
    """Add the arguments of `export recipe`."""
    form.add_argument("recipe", type=input_path, metavar="RECIPE", help="a recipe.toml, or a run")
    form.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not exist yet")
    form.add_argument(
        "--as",
        dest="target",
        choices=tuple(_NEXT),
        default="script",
        help="script (default): a Python script with transformers, peft and trl; axolotl: its YAML",
    )
    add_json_argument(form)


def recipe_or_run(name: str) -> Recipe:
    """Return the recipe in a file, or the recipe of a run. Raises UserError."""
    path = Path(name)
    return build_recipe(file=path) if path.suffix == ".toml" else find_run(name).recipe()


def _account(rows: WrittenRows, exported: ExportedRecipe) -> str:
    """Return a report on what was written and what was omitted."""
    lines = [f"{rows.train:,} samples to train on, {rows.validation:,} for validation."]
    if rows.weighted:
        lines.append("The weights of answers in the loss have no counterpart.")
    if exported.left_out:
        lines.append(f"Without a counterpart ({len(exported.left_out)}):")
        lines += align_columns([[f"  {one.key}", format_value(one.value)] for one in exported.left_out])
    return "\n".join(lines)
