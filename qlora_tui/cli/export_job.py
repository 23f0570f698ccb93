"""``export job``: a recipe as a job for Slurm, SkyPilot, dstack or Modal."""

from __future__ import annotations

import argparse
from pathlib import Path

from qlora_tui.cli.export_recipe import recipe_or_run
from qlora_tui.cli.subcommand import CommandResult, add_json_argument
from qlora_tui.export.jobs import FILES, write_job
from qlora_tui.export.unfinished_files import draft_folder, publish_new, refuse_existing


def run(args: argparse.Namespace) -> CommandResult:
    """Write the job's folder; return the command that starts the job. Raises UserError."""
    out: Path = args.out.expanduser().absolute()
    refuse_existing(out)
    recipe = recipe_or_run(args.recipe)
    with draft_folder(out) as draft:
        folder = draft / "job"
        folder.mkdir(mode=0o755)
        write_job(recipe, args.scheduler, args.accelerator, folder)
        publish_new(folder, out)
    file, command = FILES[args.scheduler]
    data = {"path": str(out), "file": str(out / file), "command": command}
    return CommandResult(data, f"Wrote {out}. Read {file}, then run in this folder: {command}")


def add_arguments(form: argparse.ArgumentParser) -> None:
    """Add the arguments of `export job`."""
    form.add_argument("recipe", metavar="RECIPE", help="a recipe.toml, or a run")
    form.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not exist yet")
    form.add_argument(
        "--as",
        dest="scheduler",
        choices=tuple(FILES),
        required=True,
        help="the scheduler of the job; for Slurm, `train --on` submits a job directly",
    )
    form.add_argument(
        "--accelerator",
        metavar="GPU",
        default="L4",
        help="kind of GPU to rent (default: L4)",
    )
    add_json_argument(form)
