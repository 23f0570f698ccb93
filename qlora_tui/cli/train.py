"""``train``: queue a run and follow it, as lines of text for people, screen readers and programs."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from qlora_tui.cli.subcommand import (
    CommandResult,
    Subcommand,
    add_recipe_arguments,
    positive_int,
    print_json,
    recipe_from_args,
)
from qlora_tui.data.sources import every_source, paths_of
from qlora_tui.errors import EXIT_FAILURE, EXIT_USAGE, UserError
from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.visible_devices import visible_gpus
from qlora_tui.recipe.conflicts import require_runnable
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import to_layer, to_recipe
from qlora_tui.runs import actions
from qlora_tui.runs.describe import PhaseFilter, describe, follow_events, summarize_status, unknown_lines
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import AnyEvent, Failed, Progress, Step
from qlora_tui.runs.machine_checks import Check, read_machine, several_gpus_problem
from qlora_tui.runs.preflight import errors, preflight
from qlora_tui.runs.status import RESUMABLE
from qlora_tui.runs.telemetry import Reading, TelemetryTail
from qlora_tui.runs.view import RunView

PLAIN_INTERVAL_S = 10.0
"""Minimum seconds between progress lines, so that a screen reader can read them out."""
_MAX_PAST_STEPS = 2000
"""Maximum number of past steps to print; of a longer run, an even sample."""


def follow(run: RunDir, *, as_json: bool) -> int:
    """Print every event from the first to the run's end. Returns 1 if it failed; Ctrl-C detaches with 0.

    Past steps of a very long run are sampled; with ``as_json`` all are printed.
    """
    view, past_events = (RunView(run), []) if as_json else RunView.from_sample(run, _MAX_PAST_STEPS)
    phases = PhaseFilter()
    for event in past_events:
        if phases.is_new(event) and not isinstance(event, Progress):
            _print_line(event.at, describe(event, view.total_steps))
    if past_events and view.step > len(view.series) * run.recipe().training.log_every:
        print(f"Showing {len(view.series):,} of {view.step:,} steps; --json prints all.", file=sys.stderr)

    printed_at = time.monotonic()

    def on_event(event: AnyEvent) -> None:
        nonlocal printed_at
        if as_json:
            print_json(event)
        elif phases.is_new(event) and (
            not isinstance(event, Progress) or time.monotonic() - printed_at >= PLAIN_INTERVAL_S
        ):
            printed_at = time.monotonic()
            _print_line(event.at, describe(event, view.total_steps))

    return _follow_to_end(view, on_event)


def follow_plain(run: RunDir) -> int:
    """Print the live screen's content as sentences: the current state, events, and state updates.

    For screen readers and logs: whole lines only, and one step per :data:`PLAIN_INTERVAL_S`.
    """
    view, past_events = RunView.from_sample(run, _MAX_PAST_STEPS)
    phases = PhaseFilter()
    for event in past_events:
        phases.is_new(event)
    machine = _LastSample(run)
    print(f"{run.id}: {summarize_status(view, machine.poll())}", flush=True)
    for health in {warning.kind: warning for warning in view.health}.values():
        _print_line(health.at, describe(health))
    if view.ending is not None:
        _print_line(view.ending.at, describe(view.ending))
    printed_at = time.monotonic()

    def on_event(event: AnyEvent) -> None:
        nonlocal printed_at
        if not phases.is_new(event):
            return
        if not isinstance(event, Step | Progress):
            _print_line(event.at, describe(event, view.total_steps))
        elif time.monotonic() - printed_at >= PLAIN_INTERVAL_S:
            printed_at = time.monotonic()
            _print_line(event.at, summarize_status(view, machine.poll()))

    return _follow_to_end(view, on_event)


class _LastSample:
    def __init__(self, run: RunDir) -> None:
        self._tail = TelemetryTail(run.telemetry_path)
        self._sample: Reading | None = None

    def poll(self) -> Reading | None:
        """Return the newest sample; None without one."""
        self._sample = next(reversed(self._tail.poll()), self._sample)
        return self._sample


def _follow_to_end(view: RunView, on_event: Callable[[AnyEvent], None]) -> int:
    run = view.run
    try:
        for event in follow_events(view, lambda detail: print(f"{run.id}: {detail}", file=sys.stderr)):
            on_event(event)
    except KeyboardInterrupt:
        print(f"\nDetached: {run.id} continues. Reattach with `qlora-tui attach {run.id}`.", file=sys.stderr)
        return 0
    if view.unknown_events:
        print(unknown_lines(view.unknown_events), file=sys.stderr)
    if view.ending is None:
        print(f"{run.id} is {view.status.state}: {view.status.detail}", file=sys.stderr)
        if view.status.state in RESUMABLE:
            print(f"`qlora-tui resume {run.id}` continues from its last checkpoint.", file=sys.stderr)
        return 0 if view.status.state in ("finished", "stopped", "paused") else EXIT_FAILURE
    return EXIT_FAILURE if isinstance(view.ending, Failed) else 0


def _print_line(at: float, line: str) -> None:
    if line:
        print(f"{time.strftime('%H:%M:%S', time.localtime(at))}  {line}", flush=True)


def run(args: argparse.Namespace) -> CommandResult | int:
    """Check and queue the run, and start a runner if none is active."""
    if args.gpus is not None and not args.print_command:
        raise UserError(
            "One GPU per run",
            what="A queued run trains on one GPU.",
            fix="Add --print-command to get the command that trains on several.",
            exit_code=EXIT_USAGE,
        )
    recipe = recipe_from_args(args)
    for option, path, value in (
        ("--name", "name", args.name),
        ("--init-from", "lora.init_from", args.init_from),
    ):
        if value is not None:
            changed = replace_setting(recipe, path, value)
            recipe = to_recipe(to_layer(changed), origin=option)
    require_runnable(recipe)
    for source in every_source(recipe.data):
        paths_of(source)  # downloads a Hub dataset, so that its rows can be checked
    if not _confirm(preflight(recipe, read_machine())):
        return CommandResult(data={"run": None}, text="Not queued.", exit_code=EXIT_FAILURE)
    if args.print_command:
        return _print_command(recipe, args.gpus)
    new = actions.submit(recipe)
    if args.detach:
        return CommandResult(
            data={"run": new.id, "path": str(new.path)},
            text=f"{new.id} is queued. Follow it with `qlora-tui attach {new.id}`.",
        )
    print(f"{new.id} (Ctrl-C detaches; the run continues)", file=sys.stderr)
    return follow(new, as_json=args.json)


def _report_checks(checks: tuple[Check, ...]) -> None:
    """Print what checks note on stderr. Raises UserError if a run with this recipe cannot start."""
    for check in checks:
        if check.problem is not None:
            raise check.problem
    for check in checks:
        if check.outcome != "ok":
            print(f"{check.outcome}: {check.label}: {check.text} {check.fix}".rstrip(), file=sys.stderr)


def _confirm(checks: tuple[Check, ...]) -> bool:
    """Print the checks' results; return whether to continue. Raises UserError if the run cannot start.

    For an error that the user may override, it prompts at a terminal, and only prints it in a script.
    """
    _report_checks(checks)
    if not errors(checks) or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    print("Launch anyway? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _print_command(recipe: Recipe, requested: int | None) -> CommandResult:
    """Create the run and print the command that trains it with one process per GPU."""
    available = _visible_gpu_count()
    gpus = requested or available or 1
    if available and gpus > available:
        raise UserError(
            "Not enough GPUs",
            what=f"--gpus {gpus} was requested, but torch sees {available}.",
            fix="Omit --gpus to use all of them.",
            exit_code=EXIT_USAGE,
        )
    if problem := several_gpus_problem(recipe, gpus):
        raise problem
    run = actions.prepare(recipe)
    command = shlex.join(_launch(run, gpus))
    print(
        f"{run.id} is not queued. This command trains it, or resumes it from its last checkpoint:",
        file=sys.stderr,
    )
    if (shares := recipe.training.gradient_accumulation) % gpus:
        print(
            f"note: {shares} micro-batches per step leave some of {gpus} GPUs idle. Set "
            f"training.gradient_accumulation to a multiple of {gpus}.",
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
    """Number of GPUs that torch will see."""
    try:
        return len(visible_gpus())
    except GpuUnavailableError:
        return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.toml", help="a recipe file")
    add_recipe_arguments(parser)
    parser.add_argument("--name", help="name of the run in lists, and the start of its id")
    parser.add_argument(
        "--init-from",
        metavar="RUN|FOLDER",
        help="train this adapter further, in a new run; the recipe must have its LoRA settings",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--detach", action="store_true", help="return at once; the run continues in the background"
    )
    instead.add_argument(
        "--print-command",
        action="store_true",
        help="create the run without queueing it, and print the torchrun command that trains it",
    )
    parser.add_argument(
        "--gpus", type=positive_int, metavar="N", help="with --print-command: number of GPUs (default: all)"
    )


SUBCOMMANDS = {"train": Subcommand(run, _arguments, uses_gpu=True)}
