"""``runs``, ``attach``, and requests to a run's trainer.

``runs check`` reports whether every run is intact, with a line for each run, and what was repaired.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qlora_tui.cli.follow import PLAIN_INTERVAL_S, follow, follow_plain
from qlora_tui.cli.main import can_show_app, open_app
from qlora_tui.cli.subcommand import (
    NOW_HELP,
    CommandResult,
    Subcommand,
    add_json_argument,
    add_run_argument,
    format_table,
)
from qlora_tui.errors import EXIT_FAILURE, EXIT_USAGE, UserError
from qlora_tui.formatting import (
    format_bytes,
    format_duration,
    format_loss,
    format_progress,
    pluralize,
)
from qlora_tui.runs import actions, control, run_queue
from qlora_tui.runs.check import CheckResult, apply_repairs, check_leftovers, check_queue, check_run
from qlora_tui.runs.describe import format_exact, format_rewards
from qlora_tui.runs.devices import devices_of
from qlora_tui.runs.directory import LAST, RunDir, all_runs, find_run
from qlora_tui.runs.metrics_table import metrics_csv, metrics_parquet, save_run
from qlora_tui.runs.process import ensure_runner
from qlora_tui.runs.run_summary import device_words
from qlora_tui.runs.slurm_runs import refresh, unsettled
from qlora_tui.runs.status import ACTIVE, read_status
from qlora_tui.runs.view import RunView
from qlora_tui.settings import settings_problem

_FEW_STEPS = 16
"""Steps to sample from a long run. A list shows no curve, so few are enough."""
_REQUESTS: dict[str, control.Kind] = {
    "checkpoint": "checkpoint",
    "evaluate": "evaluate",
    "sample": "sample",
    "finish-epoch": "finish_epoch",
    "learning-rate": "set_learning_rate",
}


def runs(args: argparse.Namespace) -> CommandResult:
    """Run the action of ``runs``; without an action, list all runs."""
    if args.action == "rename":
        run = find_run(args.run_id)
        actions.rename(run, args.name)
        return CommandResult(
            data={"run": run.id, "name": run.name}, text=f"{run.id} is now named {run.name}."
        )
    if args.action == "check":
        return check_runs(find_run(args.run_id) if args.run_id else None, repair=args.repair)
    if args.action == "save":
        return _save(find_run(args.run_id), Path(args.file).expanduser())
    if args.action == "card":
        return _card(
            find_run(args.run_id), Path(args.file).expanduser(), with_answers=not args.without_answers
        )
    if args.action == "delete":
        return _delete(find_run(args.run_id), confirmed=args.yes, in_use=args.in_use)
    if args.action == "trash":
        return _trash(empty=args.empty)
    if args.action == "restore":
        run = actions.restore_run(args.run_id)
        return CommandResult(data={"run": run.id, "restored": True}, text=f"{run.id} is restored.")
    return _list()


def _delete(run: RunDir, *, confirmed: bool, in_use: bool) -> CommandResult:
    actions.check_deletable(run)
    uses = actions.uses_of(run)
    if not confirmed or (uses and not in_use):
        raise UserError(
            "The run was not deleted",
            what=f"{run.name} would be deleted permanently, with its checkpoints and adapter.",
            why=f"The run is in use: {'; '.join(uses)}." if uses else "",
            fix=f"`qlora-tui runs delete {run.id} --yes{' --in-use' if uses else ''}` deletes it.",
            exit_code=EXIT_USAGE,
        )
    actions.delete(run)
    return CommandResult(data={"run": run.id, "deleted": True}, text=f"{run.id} is deleted.")


def _trash(*, empty: bool) -> CommandResult:
    """List the deleted runs that can be restored, or delete them permanently."""
    trashed = actions.trashed_runs()
    sizes = {each.run.path: each.size_bytes for each in trashed}
    deleted = {each.run.path for each in actions.empty_trash()} if empty else set()
    data = {
        "runs": [
            {
                "run": each.run.id,
                "path": str(each.run.path),
                "size_bytes": sizes[each.run.path],
                "deleted_at": each.deleted_at,
                "erased": each.run.path in deleted,
            }
            for each in trashed
        ],
        "total_bytes": sum(sizes.values()),
    }
    if empty:
        freed = format_bytes(sum(sizes[path] for path in deleted))
        text = f"Deleted {pluralize(len(deleted), 'run')} permanently: {freed}."
        if left := len(trashed) - len(deleted):
            text += f" {pluralize(left, 'run')} could not be deleted: check the permissions in the trash."
        return CommandResult(data, text, EXIT_FAILURE if left else 0)
    if not trashed:
        return CommandResult(data, "The trash is empty.")
    rows = [
        [
            each.run.id,
            format_bytes(sizes[each.run.path]),
            f"{format_duration(each.age_s)} ago",
            format_duration(max(0.0, actions.KEPT_S - each.age_s)),
        ]
        for each in trashed
    ]
    table = format_table(rows, ["run", "size", "deleted", "erased in"])
    total = format_bytes(sum(sizes.values()))
    fix = "`qlora-tui runs restore RUN` restores a run; `qlora-tui runs trash --empty` empties the trash."
    return CommandResult(data, f"{table}\n\n{total} in total. {fix}")


def _content(view: RunView, kind: str) -> bytes:
    """Return the table or picture of a run as the content of a file with the suffix ``kind``."""
    if kind == ".csv":
        return metrics_csv(view).encode()
    if kind == ".parquet":
        return metrics_parquet(view)
    # Imported here because the rest of this module draws nothing.
    from qlora_tui.tui.render.loss import loss_svg
    from qlora_tui.tui.render.picture import picture_file

    return picture_file(loss_svg(view), kind)


def _card(run: RunDir, file: Path, *, with_answers: bool) -> CommandResult:
    """Write a picture of a run for sharing."""
    from qlora_tui.tui.render.run_card import save_card

    save_card(run, file, with_answers=with_answers)
    return CommandResult(data={"run": run.id, "path": str(file)}, text=f"Saved the run card as {file}.")


def _save(run: RunDir, file: Path) -> CommandResult:
    """Write the steps of a run as a table, or its loss curve as a picture."""
    view = save_run(
        run,
        file,
        (".csv", ".parquet", ".svg", ".png"),
        _content,
        neither="in .csv or .parquet nor in .svg or .png",
        example="steps.csv for a table, or loss.svg for a picture",
    )
    steps = len(view.series)
    return CommandResult(
        data={"run": run.id, "path": str(file), "steps": steps}, text=f"Saved {steps:,} steps in {file}."
    )


def _list() -> CommandResult:
    """List every run, newest first, and the order of the queue."""
    waiting = run_queue.waiting()
    refresh(unsettled(all_runs()))
    views = [RunView.from_sample(run, _FEW_STEPS)[0] for run in all_runs()]
    rows = [
        [
            v.run.name,
            v.status.state,
            format_progress(v.step, v.total_steps) if v.total_steps else "-",
            format_loss(v.loss),
            _format_validation(v),
            v.status.detail or (device_words(v.run) if v.status.state in ACTIVE else ""),
        ]
        for v in views
    ]
    text = (
        format_table(rows, ["run", "state", "step", "loss", "validation", ""])
        if rows
        else "No runs yet. `qlora-tui train` starts one."
    )
    trash_bytes = actions.trash_bytes()
    if trash_bytes:
        text += f"\n\nThe trash holds {format_bytes(trash_bytes)}: `qlora-tui runs trash`."
    if problem := settings_problem():
        text += f"\n\n{problem.title}. {problem.what} {problem.fix}"
    data = {"runs": [_summary(view) for view in views], "queue": waiting, "trash_bytes": trash_bytes}
    return CommandResult(data=data, text=text)


def attach(args: argparse.Namespace) -> int:
    """Watch a run in the app, or print its events until it ends. Detaching does not stop the run."""
    run = _active_or_newest() if args.run_id is None else find_run(args.run_id)
    if run.id in run_queue.waiting():
        # The run's runner may have been killed, or ended with the machine.
        ensure_runner()
    if can_show_app() and not (args.log or args.plain or args.json):
        return open_app(gpu_gib=args.gpu_gib, mouse=not args.no_mouse, run=run)
    return follow_plain(run) if args.plain and not args.json else follow(run, as_json=args.json)


def _active_or_newest() -> RunDir:
    return next((run for run in all_runs() if read_status(run).state in ACTIVE), None) or find_run(LAST)


def resume(args: argparse.Namespace) -> CommandResult | int:
    """Queue a run to continue from its last checkpoint, or from the start if it has none."""
    run = find_run(args.run_id)
    (actions.train_now if args.now else actions.resume)(run)
    if args.follow:
        return follow(run, as_json=args.json)
    where = "resumes from its last checkpoint" if run.checkpoints() else "restarts: it has no checkpoint"
    return _state_result(run, f"{run.id} is queued and {where}.")


def stop(args: argparse.Namespace) -> CommandResult:
    """Make a run save a checkpoint and the adapter, and end; a waiting run is removed from the queue."""
    run = find_run(args.run_id)
    actions.stop(run, now=args.now)
    return _state_result(
        run, f"{run.id} will stop after saving. `qlora-tui attach {run.id}` shows when it has stopped."
    )


def pause(args: argparse.Namespace) -> CommandResult:
    """Make a run save a checkpoint and free the GPU."""
    run = find_run(args.run_id)
    actions.pause(run)
    return _state_result(run, f"{run.id} will pause after saving. Continue with `qlora-tui resume {run.id}`.")


def send_request(args: argparse.Namespace) -> CommandResult:
    """Send a request to the trainer, which accepts it at the next step."""
    run = find_run(args.run_id)
    kind = _REQUESTS[args.request]
    if (kind == "set_learning_rate") != (args.value is not None):
        raise UserError(
            "No learning rate" if args.value is None else "Unexpected argument",
            what=f"`ask RUN {args.request}` takes {'a value' if args.value is None else 'no value'}.",
            fix=f"For example `qlora-tui ask {run.id} learning-rate 1e-4`.",
            exit_code=EXIT_USAGE,
        )
    control.send_request(run, kind, args.value)
    return _state_result(run, f"Requested from {run.id}: {args.request}.")


def _state_result(run: RunDir, text: str) -> CommandResult:
    return CommandResult(data={"run": run.id, "state": read_status(run).state}, text=text)


def _summary(view: RunView) -> dict[str, Any]:
    run, status, best, last = view.run, view.status, view.best, view.last_evaluation
    devices = devices_of(run)
    return {
        "run": run.id,
        "name": run.name,
        "path": str(run.path),
        "state": status.state,
        "phase": status.phase,
        "step": view.step,
        "total_steps": view.total_steps,
        "loss": view.loss,
        "best_validation_loss": None if best is None else best.loss,
        "best_step": None if best is None else best.step,
        "validation_loss_before_training": view.loss_before_training,
        "accuracy": view.accuracy,
        "base_accuracy": view.base_accuracy,
        "reward_accuracy": None if last is None else last.reward_accuracy,
        "reward_margin": None if last is None else last.reward_margin,
        "replaced": [] if view.verified is None else list(view.verified.replaced),
        "devices": sorted(devices.keys) if devices else [],
        "sweep": run.sweep or None,
        "detail": status.detail,
        "hold": status.hold,
        "seconds_since_heartbeat": round(max(0.0, time.time() - status.at), 1) if status.at else None,
    }


def _format_validation(view: RunView) -> str:
    """Return the lowest validation loss and, if measured, the share of exact answers and the rewards.

    An example is ``1.29, exact answers 97%, base 12%``.
    """
    best = format_loss(None if view.best is None else view.best.loss)
    exact = format_exact(view.accuracy, view.base_accuracy)
    rewards = format_rewards(view.last_evaluation)
    parts = [best, *([f"exact answers {exact}"] if exact else []), *([rewards] if rewards else [])]
    return ", ".join(parts)


def _runs_arguments(parser: argparse.ArgumentParser) -> None:
    changes = parser.add_subparsers(
        dest="action",
        metavar="rename|delete|trash|restore|save|card|check",
        help="without a subcommand, all runs are listed",
    )
    rename = changes.add_parser("rename", help="rename a run (its id does not change)")
    add_run_argument(rename)
    rename.add_argument("name", metavar="NAME", help="the new name of the run")
    delete = changes.add_parser("delete", help="delete a run that has ended, permanently")
    add_run_argument(delete)
    delete.add_argument("--yes", action="store_true", help="confirm: without this option, nothing is deleted")
    delete.add_argument(
        "--in-use",
        action="store_true",
        help="delete the run even if a queued run starts from it, or a chat or an export has its adapter "
        "loaded",
    )
    trashed = changes.add_parser(
        "trash", help="list the runs that the app deleted, with size and age; they can be restored for a week"
    )
    trashed.add_argument("--empty", action="store_true", help="delete the runs in the trash permanently now")
    restored = changes.add_parser("restore", help="restore a run from the trash")
    restored.add_argument("run_id", metavar="RUN", help="the id or name of the run, or the beginning of one")
    save = changes.add_parser(
        "save",
        help="save the steps of a run as a table (.csv, .parquet) or its loss as a picture (.svg, .png)",
    )
    add_run_argument(save)
    save.add_argument("file", metavar="FILE", help="the file to write; it must not exist")
    card = changes.add_parser(
        "card",
        help="save a picture of a run to share (.svg, .png): model, curve, loss before and after, one "
        "question answered before and after training, speed and memory",
    )
    add_run_argument(card)
    card.add_argument("file", metavar="FILE", help="the file to write; it must not exist")
    card.add_argument("--without-answers", action="store_true", help="leave the question and its answers out")
    verify = changes.add_parser(
        "check", help="verify the files of runs, adapters and checkpoints by their checksums"
    )
    verify.add_argument("run_id", metavar="RUN", nargs="?", help="check this run only (default: every run)")
    verify.add_argument(
        "--repair", action="store_true", help="repair what can be repaired and list the repairs"
    )
    for change in (rename, delete, trashed, restored, save, card, verify):
        add_json_argument(change)


def _attach_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_id",
        metavar="RUN",
        nargs="?",
        help="a run's id or name, the beginning of one, or `last` (default: the run in training, or else "
        "the newest run)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--log",
        action="store_true",
        help="print each event as a line; the default if the output is not a terminal",
    )
    instead.add_argument(
        "--plain",
        action="store_true",
        help="print sentences, for a screen reader: each event, and the state of run and GPU every "
        f"{PLAIN_INTERVAL_S:.0f} s",
    )


def _stop_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument(
        "--now",
        action="store_true",
        help="discard the current step instead of finishing it; earlier steps are saved",
    )


def _resume_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("--now", action="store_true", help=f"{NOW_HELP}; also applies to a waiting run")
    parser.add_argument("--follow", action="store_true", help="also follow the run to its end")


def _request_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument(
        "request",
        choices=list(_REQUESTS),
        help="what to request from the trainer after the current step; sample: answers to "
        "training.sample_prompts, always with the most likely token, as with `chat --greedy`",
    )
    parser.add_argument("value", nargs="?", type=float, help="the new learning rate (only for learning-rate)")


SUBCOMMANDS = {
    "runs": Subcommand(
        runs,
        _runs_arguments,
        changes=("rename", "delete", "restore", "save", "card", "empty", "repair"),
    ),
    "attach": Subcommand(attach, _attach_arguments, changes=()),
    "stop": Subcommand(stop, _stop_arguments),
    "pause": Subcommand(pause, add_run_argument),
    "resume": Subcommand(resume, _resume_arguments, uses_gpu=True),
    "ask": Subcommand(send_request, _request_arguments),
}


def check_runs(run: RunDir | None, *, repair: bool) -> CommandResult:
    """Check one run, or all runs, the queue and leftovers. With ``repair``, repair what can be repaired."""
    checks: list[Callable[[], CheckResult]] = [
        partial(check_run, each) for each in ([run] if run else all_runs())
    ]
    if run is None:
        checks += [check_queue, check_leftovers]
    lines, results, problems, repairable = [], [], 0, 0
    for run_check in checks:
        result, repairs = run_check(), list[str]()
        if repair:
            result, repairs = apply_repairs(result, run_check)
        problems += len(result.defects)
        repairable += sum(defect.repair is not None for defect in result.defects)
        results.append(_check_data(result, repairs))
        if result.state is not None or result.defects or repairs:
            lines.append([result.name, result.state or "", _check_line(result, repairs)])
    text = format_table(lines, ["run", "state", "check"]) if lines else "No runs yet."
    if problems:
        count = f"{problems} {'problem' if problems == 1 else 'problems'}"
        hint = (
            ""
            if repair or not repairable
            else " `qlora-tui runs check --repair` repairs them where possible."
        )
        text += f"\n{count}.{hint}"
    data = {"runs": [r for r in results if r["state"]], "problems": problems}
    data |= {str(r["run"]): r for r in results if not r["state"]}
    return CommandResult(data=data, text=text, exit_code=EXIT_FAILURE if problems else 0)


def _check_line(result: CheckResult, done: list[str]) -> str:
    if result.in_training:
        return "in training: not checked"
    parts = [f"{defect.what} ({defect.remedy})" for defect in result.defects]
    if done:
        parts.append(f"repair: {', '.join(done)}")
    return "; ".join(parts) or "whole"


def _check_data(result: CheckResult, done: list[str]) -> dict[str, Any]:
    return {
        "run": result.name,
        "state": result.state,
        "checked": not result.in_training,
        "problems": [{"what": defect.what, "remedy": defect.remedy} for defect in result.defects],
        "repaired": done,
    }
