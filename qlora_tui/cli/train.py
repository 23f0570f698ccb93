"""``train``: queue a run and follow it unless told otherwise, or print how several GPUs train it."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from qlora_tui.catalog.context_length import context_length_warning
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.cli.arguments import positive_int
from qlora_tui.cli.follow import follow
from qlora_tui.cli.subcommand import CommandResult, Subcommand, add_recipe_arguments, recipe_from_args
from qlora_tui.data.error_cache import raise_cached_error, tokenizer_fingerprint
from qlora_tui.data.quick_check import quick_check, warning_of
from qlora_tui.data.sources import every_source, open_source
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.untrained_tokens import token_ids
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.nvml import list_gpus
from qlora_tui.gpu.visible_devices import cuda_device_order
from qlora_tui.recipe.conflicts import require_runnable
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.targets import resolve_targets
from qlora_tui.runs import actions
from qlora_tui.runs.directory import RunDir


def run(args: argparse.Namespace) -> CommandResult | int:
    """Queue the run and see that a runner is at work."""
    if args.gpus is not None and not args.print_command:
        raise UserError(
            "One GPU at a time",
            what="A run that is queued trains on one GPU.",
            fix="With --print-command it says how to train on several.",
            exit_code=EXIT_USAGE,
        )
    recipe = recipe_from_args(args)
    require_runnable(recipe)
    # What the trainer would refuse in ten seconds is refused now.
    model_files = resolve_model(recipe.model.id)
    architecture = model_files.architecture
    resolve_targets(recipe.lora, architecture.modules)
    if recipe.lora.trainable_tokens and model_files.gguf_file is None:
        token_ids(recipe.lora.trainable_tokens, ChatTokenizer.from_folder(model_files.folder))
    sources = every_source(recipe.data)
    choice = recipe.data.preferences
    data_files = [
        (source, file) for i, source in enumerate(sources) for file in open_source(source, choice, i)[0]
    ]
    tokens = tokenizer_fingerprint(model_files.folder, recipe.model.chat_template, recipe.data.train_on)
    raise_cached_error([(source, file.path) for source, file in data_files], tokens)
    first_rows = quick_check((file for _, file in data_files), recipe.data)
    for warning in first_rows.warnings:
        print(f"warning: {warning_of(warning)}", file=sys.stderr)
    if not first_rows.complete:
        print("note: many rows; those not read yet are checked when the run starts.", file=sys.stderr)
    if too_long := context_length_warning(recipe.data.max_length, architecture):
        print(f"warning: {too_long}", file=sys.stderr)
    if args.print_command:
        return _print_command(recipe, args.gpus)
    new = actions.submit(recipe)
    if args.detach:
        return CommandResult(
            data={"run": new.id, "path": str(new.path)},
            text=f"{new.id} is queued. `qlora-tui attach {new.id}` follows it.",
        )
    print(f"{new.id} (Ctrl-C detaches; the run goes on)", file=sys.stderr)
    return follow(new, as_json=args.json)


def _print_command(recipe: Recipe, requested: int | None) -> CommandResult:
    """Make the run, and give the command that trains it, a process a GPU, sharing out each step's rows."""
    available = _visible_gpu_count()
    gpus = requested or available or 1
    if available and gpus > available:
        raise UserError(
            "Not enough GPUs",
            what=f"--gpus {gpus} was requested, but torch sees {available}.",
            fix="Without --gpus it is for all of them.",
            exit_code=EXIT_USAGE,
        )
    run = actions.prepare(recipe)
    command = shlex.join(_launch(run, gpus))
    print(f"{run.id} is not queued. This trains it, or goes on from its last checkpoint:", file=sys.stderr)
    if (shares := recipe.training.gradient_accumulation) % gpus:
        print(
            f"(A step has {shares} micro-batches for {gpus} GPUs, so some wait: better make "
            f"training.gradient_accumulation a multiple of {gpus}.)",
            file=sys.stderr,
        )
    return CommandResult(
        data={"run": run.id, "path": str(run.path), "gpus": gpus, "command": command}, text=command
    )


def _launch(run: RunDir, gpus: int) -> list[str]:
    torchrun = Path(sys.executable).with_name("torchrun")
    launcher = [str(torchrun)] if torchrun.exists() else [sys.executable, "-m", "torch.distributed.run"]
    processes = ["--standalone", "--nproc-per-node", str(gpus)]
    return [*launcher, *processes, "-m", "qlora_tui.training", str(run.path)]


def _visible_gpu_count() -> int:
    """How many torch will see."""
    try:
        return len(cuda_device_order(list_gpus()))
    except GpuUnavailableError:
        return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.toml", help="a recipe file")
    add_recipe_arguments(parser)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--detach", action="store_true", help="return at once; the run goes on by itself")
    instead.add_argument(
        "--print-command",
        action="store_true",
        help="make the run without queueing it, and print the torchrun command that trains it",
    )
    parser.add_argument(
        "--gpus", type=positive_int, metavar="N", help="with --print-command: number of GPUs (default: all)"
    )


SUBCOMMANDS = {"train": Subcommand(run, _arguments)}
