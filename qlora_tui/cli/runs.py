"""``runs``, ``attach``, and what can be asked of a run."""

from __future__ import annotations

import argparse
import time
from typing import Any

from qlora_tui.cli.follow import follow
from qlora_tui.cli.verb import Outcome, Verb, table
from qlora_tui.errors import WRONG_CALL, Problem
from qlora_tui.format import figure
from qlora_tui.runs import actions, control, queue
from qlora_tui.runs.directory import RunDir, all_runs, find
from qlora_tui.runs.status import Status, read_status


def list_runs(args: argparse.Namespace) -> Outcome:
    """Every run, newest first, and the queue's order."""
    waiting = queue.waiting()
    known = [(run, read_status(run)) for run in all_runs()]
    rows = [
        [run.id, status.state, _steps(status), figure(status.loss, 3), status.detail] for run, status in known
    ]
    text = (
        table(rows, ["run", "state", "step", "loss", ""])
        if rows
        else "No runs yet. `qlora-tui train` starts one."
    )
    return Outcome(data={"runs": [_summary(r, s) for r, s in known], "queue": waiting}, text=text)


def attach(args: argparse.Namespace) -> int:
    """Show a run's events from its first, and follow it to its end. Ctrl-C leaves it running."""
    return follow(find(args.run_id), as_json=args.json)


def resume(args: argparse.Namespace) -> Outcome | int:
    """Go on from the last checkpoint."""
    run = find(args.run_id)
    actions.resume(run)
    if args.follow:
        return follow(run, as_json=args.json)
    return _done(run, f"{run.id} is queued and goes on from its last checkpoint.")


def stop(args: argparse.Namespace) -> Outcome:
    """Save a checkpoint and the adapter, and end; a waiting run leaves the queue."""
    run = find(args.run_id)
    actions.stop(run)
    return _done(run, f"{run.id} was asked to stop. `qlora-tui attach {run.id}` shows when it has.")


def pause(args: argparse.Namespace) -> Outcome:
    """Save a checkpoint and leave the GPU."""
    run = find(args.run_id)
    actions.pause(run)
    return _done(run, f"{run.id} was asked to pause. `qlora-tui resume {run.id}` goes on.")


_ASKABLE: dict[str, control.Kind] = {
    "checkpoint": "checkpoint",
    "evaluate": "evaluate",
    "sample": "sample",
    "finish-epoch": "finish_epoch",
    "learning-rate": "set_learning_rate",
}


def ask(args: argparse.Namespace) -> Outcome:
    """Leave a request for the trainer; it is taken at the next step."""
    run = find(args.run_id)
    kind = _ASKABLE[args.request]
    if (kind == "set_learning_rate") != (args.value is not None):
        raise Problem(
            "A learning rate is missing" if args.value is None else "One word too many",
            what=f"`ask RUN {args.request}` takes {'a value' if args.value is None else 'no value'}.",
            fix=f"For example `qlora-tui ask {run.id} learning-rate 1e-4`.",
            exit_code=WRONG_CALL,
        )
    control.ask(run, kind, args.value)
    return _done(run, f"{run.id} was asked: {args.request}.")


def _done(run: RunDir, text: str) -> Outcome:
    return Outcome(data={"run": run.id, "state": read_status(run).state}, text=text)


def _summary(run: RunDir, status: Status) -> dict[str, Any]:
    return {
        "run": run.id,
        "path": str(run.path),
        "state": status.state,
        "phase": status.phase,
        "step": status.step,
        "total_steps": status.total_steps,
        "loss": status.loss,
        "detail": status.detail,
        "seconds_since_heartbeat": round(time.time() - status.at, 1) if status.at else None,
    }


def _steps(status: Status) -> str:
    return f"{status.step:,}/{status.total_steps:,}" if status.total_steps else "-"


def _one_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_id", metavar="RUN", help="a run's id, the beginning of one, or `last`")


def _resume_arguments(parser: argparse.ArgumentParser) -> None:
    _one_run(parser)
    parser.add_argument("--follow", action="store_true", help="follow it to its end")


def _ask_arguments(parser: argparse.ArgumentParser) -> None:
    _one_run(parser)
    parser.add_argument("request", choices=list(_ASKABLE))
    parser.add_argument("value", nargs="?", type=float)


VERBS = {
    "runs": Verb(list_runs),
    "attach": Verb(attach, _one_run),
    "stop": Verb(stop, _one_run),
    "pause": Verb(pause, _one_run),
    "resume": Verb(resume, _resume_arguments),
    "ask": Verb(ask, _ask_arguments),
}
