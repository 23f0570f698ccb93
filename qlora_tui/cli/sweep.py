"""``sweep``: start, list and show sweeps; pause, resume, stop or extend one; adopt its winner."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_tui.cli.subcommand import (
    CommandResult,
    ProgressLine,
    Subcommand,
    add_gpu_argument,
    add_json_argument,
    add_recipe_arguments,
    checks_as_data,
    format_checks,
    format_table,
    positive_int,
    whole_number,
)
from qlora_tui.data.sources import every_source, paths_of
from qlora_tui.errors import EXIT_FAILURE, UserError
from qlora_tui.formatting import format_loss, format_path
from qlora_tui.runs.doctor import CheckKind, Machine, read_machine
from qlora_tui.runs.expected_time import count_data, forecast
from qlora_tui.runs.holds import time_words
from qlora_tui.runs.preflight import errors, preflight
from qlora_tui.runs.process import ensure_runner
from qlora_tui.sweeps import actions
from qlora_tui.sweeps.describe import (
    effects_title,
    outcome_words,
    plan_ahead,
    plan_sentence,
    state_sentence,
    tie_sentence,
    trial_table,
    unequal_sentence,
    verdict_sentence,
    what_settings_bought,
)
from qlora_tui.sweeps.directory import SweepDir, all_sweeps, find_sweep
from qlora_tui.sweeps.plan import Costs, Plan
from qlora_tui.sweeps.sheet import Sheet, build_sheet
from qlora_tui.sweeps.space import apply_point, parse_vary, value_text
from qlora_tui.sweeps.study import FEWEST_RESULTS, importances
from qlora_tui.sweeps.view import SweepView, Trial, read_sweep

_SETTINGS = ("name", "method", "trials", "rounds", "seeds", "seed")


def run(args: argparse.Namespace) -> CommandResult:
    """Run the action of ``sweep``; without an action, list the sweeps. Raises UserError."""
    match args.action:
        case "start":
            return _start(args)
        case "show":
            return _show(find_sweep(args.sweep))
        case "pause":
            return _changed(find_sweep(args.sweep), actions.pause, "pauses once its run has saved")
        case "resume":
            return _changed(find_sweep(args.sweep), actions.resume, "continues")
        case "stop":
            return _changed(find_sweep(args.sweep), actions.stop, "is stopped")
        case "add-time":
            sweep = find_sweep(args.sweep)
            deadline = actions.add_time(sweep, actions.parse_duration(args.time))
            text = f"{sweep.id} continues until {time_words(deadline)}."
            return CommandResult({"sweep": sweep.id, "deadline": deadline}, text)
        case "adopt":
            sweep = find_sweep(args.sweep)
            trial, path = actions.adopt(sweep, args.name, args.trial)
            text = f"Trial {trial} is saved as the preset {args.name} ({format_path(path)})."
            data = {"sweep": sweep.id, "trial": trial, "preset": args.name, "path": str(path)}
            return CommandResult(data, text)
        case _:
            return _list()


def sheet_from_args(args: argparse.Namespace) -> Sheet:
    """Build a sweep from the arguments of ``sweep start``. Raises UserError."""
    settings = {name: value for name in _SETTINGS if (value := getattr(args, name)) is not None}
    return build_sheet(
        file=Path(args.recipe).expanduser() if args.recipe else None,
        preset=args.preset,
        sets=args.sets,
        model=args.model,
        data=args.data,
        settings=settings,
        vary=dict(map(parse_vary, args.vary)),
    )


def _start(args: argparse.Namespace) -> CommandResult:
    sheet = sheet_from_args(args)
    deadline = actions.parse_until(args.until) if args.until else None
    if args.lasts:
        deadline = time.time() + actions.parse_duration(args.lasts)
    actions.check(sheet, has_time=deadline is not None)
    if sheet.sweep.method == "tpe" and 0 < sheet.number_of_trials() <= FEWEST_RESULTS:
        print(
            f"note: all trials will be random, because tpe uses results only after {FEWEST_RESULTS} trials.",
            file=sys.stderr,
        )
    for source in every_source(sheet.recipe.data):
        paths_of(source)  # downloads a Hub dataset, so that its rows can be checked
    if args.dry_run:
        return _dry_run(sheet, deadline)
    machine = read_machine()
    for check in preflight(sheet.recipe, machine):
        if check.problem is not None:
            raise check.problem
    if note := _memory_note(sheet, machine):
        print(note, file=sys.stderr)
    sweep = actions.start(sheet, deadline)
    end = "" if deadline is None else f", and ends at {time_words(deadline)}"
    return CommandResult(
        data={"sweep": sweep.id, "path": str(sweep.path), "deadline": deadline},
        text=f"Started {sweep.id}{end}. `qlora-tui sweep show {sweep.id}` shows its trials and verdict.",
    )


def _memory_note(sheet: Sheet, machine: Machine) -> str:
    """Return a warning if the trial that takes the most memory may not fit; otherwise an empty text."""
    point = actions.heaviest_point(sheet)
    checks = preflight(apply_point(sheet.recipe, point), machine)
    memory = next((check for check in checks if check.kind is CheckKind.MEMORY), None)
    if memory is None or memory.outcome == "ok":
        return ""
    values = ", ".join(f"{path} = {value_text(value)}" for path, value in point.items())
    return (
        f"{memory.outcome}: the trial with {values} takes the most memory: {memory.text} "
        "A trial that runs out of memory is retried with settings that need less, and fails if none fits."
    )


def _dry_run(sheet: Sheet, deadline: float | None) -> CommandResult:
    """Check a sweep, and report its trials, rounds and duration. Creates nothing."""
    with ProgressLine() as line:
        count_data(sheet.recipe, lambda progress: line.show(f"{progress.done}% of the samples counted"))
    machine = read_machine()
    expected = forecast(sheet.recipe, machine)
    costs = Costs(expected.time.seconds, 0.0) if expected and expected.time else None
    plan = plan_ahead(sheet, deadline, costs)
    lines = [plan] if isinstance(plan, str) else []
    if isinstance(plan, Plan):
        trials, rounds = plan.trials, plan.rounds
    elif costs is None:
        trials, rounds = sheet.number_of_trials(), sheet.sweep.rounds or 1
    else:
        trials, rounds = 0, 0
    checks = preflight(sheet.recipe, machine, expected=expected)
    if note := _memory_note(sheet, machine):
        lines.append(note)
    if trials:
        lines.append(plan_sentence(sheet, trials, rounds, costs))
    lines.append("Estimated times do not include loading and evaluations. Nothing was started.")
    failed = bool(errors(checks))
    return CommandResult(
        data={
            "ok": not failed,
            "trials": trials,
            "rounds": rounds,
            "seconds_of_a_run": costs.full_s if costs else None,
            "seconds": costs.of_rounds(trials, rounds) + costs.of_whole_runs(2 * sheet.sweep.seeds - 1)
            if costs and trials
            else None,
            "checks": checks_as_data(checks),
        },
        text="\n".join([*format_checks(checks), "", *lines]),
        exit_code=EXIT_FAILURE if failed else 0,
    )


def _list() -> CommandResult:
    views, broken = [], []
    for sweep in all_sweeps():
        try:
            views.append(read_sweep(sweep))
        except UserError as problem:
            facts = {"sweep": sweep.id, "path": str(sweep.path), "state": "unreadable"}
            broken.append({**facts, "problem": problem.what})
    rows = [[v.sweep.id, v.state, str(len(v.trials)), verdict_sentence(v)] for v in views]
    rows += [[one["sweep"], one["state"], "", one["problem"]] for one in broken]
    text = format_table(rows, ["sweep", "state", "runs", ""]) if rows else ""
    _care_for(views)
    return CommandResult(
        {"sweeps": [*(_summary(view) for view in views), *broken]},
        text or "No sweeps yet. `qlora-tui sweep start --help` shows how to start one.",
    )


def _show(sweep: SweepDir) -> CommandResult:
    view = read_sweep(sweep)
    _care_for([view])
    header, rows = trial_table(view)
    lines = [f"{sweep.id}: {state_sentence(view)}", ""]
    if rows:
        lines += [format_table(rows, header), ""]
    lines.append(verdict_sentence(view))
    lines += filter(None, (tie_sentence(view), unequal_sentence(view)))
    bought = what_settings_bought(view)
    shares, note = _importances(view)
    if bought:
        table = [[one.path, one.value, str(one.trials), format_loss(one.mean)] for one in bought]
        lines += ["", format_table(table, [effects_title(view), "value", "trials", "mean loss"])]
    if shares:
        words = ", ".join(f"{path} {share:.0%}" for path, share in shares.items())
        lines += ["", f"Share of the differences in loss that each setting explains: {words}."]
    elif note and bought:
        lines += ["", note]
    return CommandResult(
        {**_summary(view), "trials": [_trial(t) for t in view.trials], "importances": shares},
        "\n".join(lines),
    )


def _importances(view: SweepView) -> tuple[dict[str, float], str]:
    try:
        return importances(view), ""
    except UserError as problem:
        return {}, f"To see the importance of each setting, install Optuna. {problem.fix}"


def _care_for(views: list[SweepView]) -> None:
    """Start a runner if a sweep needs one: the last one may have been killed, or the machine restarted."""
    if any(view.state in ("running", "waiting") for view in views):
        ensure_runner()


def _summary(view: SweepView) -> dict[str, Any]:
    verdict = view.verdict
    return {
        "sweep": view.sweep.id,
        "path": str(view.sweep.path),
        "state": view.state,
        "deadline": view.deadline,
        "winner": verdict.winner,
        "verdict": {
            "basis": verdict.basis,
            "is_better": verdict.is_better,
            "base_loss": verdict.base,
            "winner_loss": verdict.found,
            "noise": verdict.noise,
            "margin": verdict.margin,
            "base_runs": verdict.base_runs,
            "winner_runs": verdict.found_runs,
        },
    }


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "role": trial.role,
        "values": trial.values,
        "seed": trial.seed,
        "run": trial.run.id if trial.run else None,
        "outcome": trial.outcome,
        "detail": outcome_words(trial),
        "step": trial.step,
        "total_steps": trial.total_steps,
        "rounds": [
            {"round": number, "step": result.step, "tokens": result.tokens, "validation_loss": result.loss}
            for number, result in trial.results.items()
        ],
    }


def _changed(sweep: SweepDir, change: Callable[[SweepDir], None], words: str) -> CommandResult:
    change(sweep)
    state = read_sweep(sweep).state
    return CommandResult({"sweep": sweep.id, "state": state}, f"{sweep.id} {words}.")


def _arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(
        dest="action",
        metavar="start|list|show|pause|resume|stop|add-time|adopt",
        help="without a subcommand, all sweeps are listed",
    )
    start = commands.add_parser("start", help="start a sweep; it runs in the background")
    start.add_argument(
        "recipe",
        nargs="?",
        metavar="FILE.toml",
        help="a recipe, with or without a table [sweep]",
    )
    add_recipe_arguments(start)
    start.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="FIELD=VALUES",
        help="setting to vary: a range (1e-5..1e-3, 1e-5..1e-3:log), values (8,16,32) or TOML; repeatable",
    )
    start.add_argument(
        "--method",
        choices=("random", "grid", "tpe"),
        help="how values are chosen: at random (default), every combination, or by Optuna from the results",
    )
    start.add_argument("--trials", type=positive_int, metavar="N", help="number of trials")
    start.add_argument(
        "--rounds",
        type=positive_int,
        metavar="N",
        help="rounds of successive halving: after each round, only the better half continues (default: 1)",
    )
    start.add_argument(
        "--seeds",
        type=positive_int,
        metavar="N",
        help="number of seeds with which the recipe and the winner are trained, to measure the noise "
        "(default: 3)",
    )
    start.add_argument("--seed", type=whole_number, metavar="N", help="seed of the random values")
    start.add_argument("--name", help="name of the sweep, with which its id begins")
    end = start.add_mutually_exclusive_group()
    end.add_argument(
        "--until", metavar="HH:MM", help="end at this time, which determines the trials and rounds"
    )
    end.add_argument("--for", dest="lasts", metavar="TIME", help="end after this duration, such as 3h or 90m")
    start.add_argument(
        "--dry-run",
        action="store_true",
        help="only check, and print the number of trials and the time that they take",
    )
    parsers = [start, commands.add_parser("list", help="list all sweeps")]
    for name, help_ in (
        ("show", "show trials, verdict and the effect of each setting"),
        ("pause", "pause a sweep: its run saves and frees the GPU"),
        ("resume", "continue a paused sweep"),
        ("stop", "stop a sweep; its results are kept"),
        ("add-time", "extend a sweep; a sweep that has ended continues with further trials"),
        ("adopt", "save the winner's recipe as a preset"),
    ):
        one = commands.add_parser(name, help=help_)
        one.add_argument("sweep", metavar="SWEEP", help="a sweep's id, the beginning of an id, or `last`")
        parsers.append(one)
        if name == "add-time":
            one.add_argument("time", metavar="TIME", help="such as 2h, 90m or 1h30m")
        elif name == "adopt":
            one.add_argument("name", metavar="NAME", help="name of the preset")
            one.add_argument(
                "--trial", type=whole_number, metavar="N", help="adopt this trial instead of the winner"
            )
    for one in parsers:
        add_json_argument(one)
    add_gpu_argument(start)


SUBCOMMANDS = {
    "sweep": Subcommand(
        run,
        _arguments,
        uses_gpu=True,
        changes=("start", "pause", "resume", "stop", "add-time", "adopt"),
    )
}
