"""``train``: check a recipe, queue a run and follow it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from contextlib import suppress

from qlora_tui.catalog.local_models import find_files
from qlora_tui.cli.follow import follow
from qlora_tui.cli.subcommand import (
    NOW_HELP,
    CommandResult,
    ProgressLine,
    Subcommand,
    add_recipe_arguments,
    checks_as_data,
    format_checks,
    input_path,
    note_description,
    positive_int,
    recipe_from_args,
)
from qlora_tui.data.sources import every_source, paths_of
from qlora_tui.errors import EXIT_FAILURE, UsageError, UserError
from qlora_tui.formatting import capitalize
from qlora_tui.recipe.conflicts import require_runnable
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import to_layer, to_recipe
from qlora_tui.runs import actions
from qlora_tui.runs.devices import wanted_devices
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.doctor import Check, CheckKind, read_machine
from qlora_tui.runs.expected_time import Forecast, count_data, forecast, measured_forecast
from qlora_tui.runs.preflight import OF_MACHINE, errors, preflight, with_count
from qlora_tui.runs.process import threads_variable, trainer_command
from qlora_tui.runs.slurm_time import plan_job
from qlora_tui.runs.step_probe import probe_steps, progress_words
from qlora_tui.worker import module_argv


def run(args: argparse.Namespace) -> CommandResult | int:
    """Check a recipe, queue a run and follow it; or do what an option requests instead."""
    recipe = recipe_from_args(args)
    for option, path, value in (
        ("--name", "name", args.name),
        ("--init-from", "lora.init_from", args.init_from),
        ("--gpus", "training.gpus", args.gpus),
    ):
        if value is not None:
            changed = replace_setting(recipe, path, value)
            recipe = to_recipe(to_layer(changed), origin=option)
    require_runnable(recipe)
    for source in every_source(recipe.data):
        paths_of(source)  # downloads a Hub dataset, so that its rows can be checked
    with suppress(UserError):  # the checks report what is wrong
        note_description(find_files(recipe.model.id).architecture)
    if args.on:
        return _on_cluster(recipe, args)
    if args.probe:
        return _probe(recipe)
    if args.dry_run:
        return _dry_run(recipe)
    if not _confirm(preflight(recipe, read_machine())):
        return CommandResult(data={"run": None}, text="Not queued.", exit_code=EXIT_FAILURE)
    if args.print_command:
        return _print_command(recipe)
    return _follow(actions.submit(recipe, now=args.now), args)


def _follow(new: RunDir, args: argparse.Namespace) -> CommandResult | int:
    if args.detach:
        return CommandResult(
            data={"run": new.id, "path": str(new.path)},
            text=f"{new.id} is queued. Follow it with `qlora-tui attach {new.id}`.",
        )
    print(f"{new.id} (Ctrl-C detaches; the run continues)", file=sys.stderr)
    return follow(new, as_json=args.json)


def _on_cluster(recipe: Recipe, args: argparse.Namespace) -> CommandResult | int:
    """Check the recipe, and submit a job that trains it."""
    for option, is_given in (
        ("--gpu", args.gpu),
        ("--now", args.now),
        ("--probe", args.probe),
        ("--print-command", args.print_command),
    ):
        if is_given:
            raise UsageError(
                f"{option} is not possible on a cluster",
                what=f"{option} and --on cannot be used together.",
                why="On a cluster, Slurm decides when a run trains and on which GPU.",
                fix=f"Leave out {option} or --on.",
            )
    _count(recipe)
    plan = plan_job(recipe, args.on)
    # The job does not use the devices of this machine.
    checks = tuple(
        check
        for check in preflight(recipe, read_machine(), exact_within_s=0.0)
        if check.kind not in OF_MACHINE
    )
    if args.dry_run:
        failed = bool(errors(checks))
        outcome = "The run would not start: fix the errors above." if failed else "Nothing was submitted."
        return CommandResult(
            data={"ok": not failed, "limit_s": plan.limit_s, "checks": checks_as_data(checks)},
            text="\n".join([*format_checks(checks), "", f"{plan.words} {outcome}"]),
            exit_code=EXIT_FAILURE if failed else 0,
        )
    if not _confirm(checks):
        return CommandResult(data={"run": None}, text="Not submitted.", exit_code=EXIT_FAILURE)
    print(plan.words, file=sys.stderr)
    return _follow(actions.submit_job(recipe, plan), args)


def _count(recipe: Recipe) -> UserError | None:
    """Count the samples of a recipe, which determine its steps; return the error if this failed."""
    with ProgressLine() as line:
        try:
            count_data(recipe, lambda progress: line.show(f"{progress.done}% of the samples counted"))
        except UserError as error:
            return error
    return None


def _dry_run(recipe: Recipe) -> CommandResult:
    """Check the recipe and report how long the run would be. Creates nothing."""
    problem = _count(recipe)
    machine = read_machine()
    expected = forecast(recipe, machine)
    checks = with_count(preflight(recipe, machine, expected=expected), problem)
    failed = bool(errors(checks))
    time = expected.time if expected else None
    length = expected.length if expected else None
    return CommandResult(
        data={
            "ok": not failed,
            "steps": length.steps if length else None,
            "steps_are_exact": length.is_exact if length else None,
            "seconds": time.seconds if time else None,
            "seconds_from": time.source if time else None,
            "checks": checks_as_data(checks),
        },
        text="\n".join([*format_checks(checks), "", _plan_sentence(expected, failed=failed)]),
        exit_code=EXIT_FAILURE if failed else 0,
    )


def _probe(recipe: Recipe) -> CommandResult:
    """Train three steps, discard them, and report how long the run would be."""
    machine = read_machine()
    _report_checks(preflight(recipe, machine))
    with ProgressLine() as line:
        probe = probe_steps(recipe, lambda progress: line.show(progress_words(progress)))
    expected = forecast(recipe, machine)
    known = None if expected is None else measured_forecast(expected, probe)
    return CommandResult(
        data={
            "steps_measured": probe.steps,
            "seconds_per_step": probe.seconds / probe.steps,
            "tokens_per_s": probe.tokens / probe.seconds,
            "peak_bytes": probe.peak_bytes,
            "steps": known.length.steps if known else None,
            "seconds": known.time.seconds if known and known.time else None,
        },
        text=_plan_sentence(known, failed=False) if known else f"{capitalize(probe.words)}.",
    )


def _plan_sentence(expected: Forecast | None, *, failed: bool) -> str:
    """Return sentences on how long the run would be, and that nothing was queued.

    With ``failed``, the last sentence says instead that the run would not start.
    """
    outcome = "The run would not start: fix the errors above." if failed else "Nothing was queued."
    if expected is None:
        return outcome
    if expected.time is None:
        time = "their time is unknown until the first ones have run"
    else:
        time = f"{expected.duration} of training, {expected.time.source}"
    return f"{capitalize(expected.steps)}, {time}. {outcome}"


def _report_checks(checks: tuple[Check, ...]) -> None:
    """Print warnings, errors and the expected time on stderr. Raises UserError if the run cannot start."""
    for check in checks:
        if check.problem is not None:
            raise check.problem
    for check in checks:
        if check.outcome != "ok" or check.kind is CheckKind.TIME:
            print(f"{check.outcome}: {check.label}: {check.text} {check.fix}".rstrip(), file=sys.stderr)


def _confirm(checks: tuple[Check, ...]) -> bool:
    """Print the results of checks; return whether to continue. Raises UserError if the run cannot start.

    If there is an error that the user may override, asks whether to launch anyway. Without a terminal, the
    error is only printed, and the result is True.
    """
    _report_checks(checks)
    if not errors(checks) or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    print("Launch anyway? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _print_command(recipe: Recipe) -> CommandResult:
    """Create the run, and print the command that trains it with one process per GPU."""
    processes = wanted_devices(recipe, os.environ).processes
    run = actions.prepare(recipe)
    threads = [f"{name}={value}" for name, value in threads_variable(processes).items()]
    command = shlex.join(
        [*(["env", *threads] if threads else []), *module_argv(*trainer_command(run.path, processes))]
    )
    print(
        f"{run.id} is not queued. This command trains it, or resumes it from its last checkpoint:",
        file=sys.stderr,
    )
    return CommandResult(
        data={"run": run.id, "path": str(run.path), "gpus": processes, "command": command}, text=command
    )


def _number_of_gpus(text: str) -> int:
    return 0 if text == "all" else positive_int(text)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.toml", help="a recipe file")
    add_recipe_arguments(parser)
    parser.add_argument("--name", help="name of the run in lists, and the start of its id")
    parser.add_argument(
        "--init-from",
        type=input_path,
        metavar="RUN|FOLDER",
        help="train this adapter further, in a new run; the recipe must have its LoRA settings",
    )
    parser.add_argument("--now", action="store_true", help=NOW_HELP)
    parser.add_argument(
        "--on",
        metavar="TARGET",
        help="train on a Slurm cluster, with the job options in targets/TARGET.toml of the config folder",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--detach", action="store_true", help="return at once; the run continues in the background"
    )
    instead.add_argument(
        "--print-command",
        action="store_true",
        help="create the run without queueing it, and print the command that trains it",
    )
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="only check the recipe, count its steps and say how long they take",
    )
    instead.add_argument(
        "--probe",
        action="store_true",
        help="train three steps, discard them, and print the time and memory that they took",
    )
    parser.add_argument(
        "--gpus", type=_number_of_gpus, metavar="N|all", help="number of GPUs to train on (training.gpus)"
    )


SUBCOMMANDS = {"train": Subcommand(run, _arguments, uses_gpu=True)}
