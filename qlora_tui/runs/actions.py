"""Actions on runs, shared by the command line and the app's keys."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from qlora_tui import paths
from qlora_tui.drafts import discard
from qlora_tui.errors import EXIT_USAGE, UserError, disk_problems
from qlora_tui.files import atomic_write
from qlora_tui.locks import is_held, is_locked
from qlora_tui.recipe.absolute_paths import with_absolute_paths
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import control, run_queue
from qlora_tui.runs.directory import LAST, RunDir, all_runs, create_run
from qlora_tui.runs.exports import delete_unfinished, is_exported
from qlora_tui.runs.initial_adapter import with_initial_adapter
from qlora_tui.runs.spawn import ensure_runner
from qlora_tui.runs.status import ACTIVE, RESUMABLE, State, read_status
from qlora_tui.settings import GPU_VARIABLE

LONGEST_NAME = 60


@disk_problems()
def submit(recipe: Recipe) -> RunDir:
    """Queue a new run and make sure a runner is active. The recipe should be ready to run."""
    run = create_run(with_initial_adapter(with_absolute_paths(recipe)), _gpu())
    run_queue.enqueue(run)
    ensure_runner()
    return run


@disk_problems()
def prepare(recipe: Recipe) -> RunDir:
    """Create a run without queueing it, for trainers that the user starts."""
    run = create_run(with_initial_adapter(with_absolute_paths(recipe)), _gpu())
    run_queue.mark_not_queued(run, "Not queued: start it with the printed command.")
    return run


@disk_problems()
def resume(run: RunDir) -> None:
    """Queue an ended run again, to continue from its last checkpoint, or from the start if it has none."""
    status = read_status(run)
    if status.state not in RESUMABLE:
        raise UserError(
            "Nothing to resume",
            what=f"{run.id} is {status.state}.",
            fix=_instead_of_resuming(run, status.state),
            exit_code=EXIT_USAGE,
        )
    if gpu := _gpu():
        atomic_write(run.gpu_path, f"{gpu}\n", durable=True)
    run_queue.requeue(run)
    ensure_runner()


def _gpu() -> str:
    """The GPU that the user chose for what this process does (``--gpu``); empty if none was chosen."""
    return os.environ.get(GPU_VARIABLE, "")


def _instead_of_resuming(run: RunDir, state: State) -> str:
    if state == "finished":
        return (
            f"All its steps are done. Talk to it: `qlora-tui chat {run.id}`. "
            f"To train its adapter further: `qlora-tui train {shlex.quote(str(run.recipe_path))} "
            f"--init-from {run.id}`."
        )
    if state in ACTIVE or state == "queued":
        return f"It needs no resuming. Watch it: `qlora-tui attach {run.id}`."
    return "Only a run that failed, was stopped, paused or lost can be resumed."


@disk_problems()
def stop(run: RunDir, *, now: bool = False) -> None:
    """End a run: remove it from the queue, or have its trainer save a checkpoint and the adapter and exit.

    With ``now`` it does not wait for the end of the step or evaluation in progress, which is given up.
    """
    if not run_queue.cancel(run):
        control.send_request(run, "stop_now" if now else "stop")


@disk_problems()
def pause(run: RunDir) -> None:
    """Have the trainer save a checkpoint and free the GPU; ``resume`` continues the run."""
    control.send_request(run, "pause")


@disk_problems()
def rename(run: RunDir, name: str) -> None:
    """Rename a run; its id stays. Raises UserError if the name is invalid or taken by another run."""
    wrong = validate_name(name) or _taken(run, name.strip())
    if wrong:
        raise UserError("Invalid run name", what=wrong, fix="Use one short line.", exit_code=EXIT_USAGE)
    atomic_write(run.name_path, f"{name.strip()}\n", durable=True)


def validate_name(name: str) -> str:
    """Describe what is wrong with a run name, in a sentence; empty if it is valid."""
    if not name.strip() or not name.strip().isprintable():
        return "A name is one non-empty line."
    if name.strip() == LAST:
        return f"`{LAST}` stands for the newest run."
    return f"It is longer than {LONGEST_NAME} characters." if len(name.strip()) > LONGEST_NAME else ""


def _taken(run: RunDir, name: str) -> str:
    others = (other for other in all_runs() if other.id != run.id)
    return next((f"{other.id} is called so." for other in others if name in (other.id, other.name)), "")


def check_deletable(run: RunDir) -> None:
    """Raise UserError if the run is queued, in training, or being measured, or is a link to one elsewhere."""
    if run.path.is_symlink():
        target = run.path.resolve()
        raise UserError(
            "The run is elsewhere",
            what=f"{run.path} is a link to {target}.",
            why="Nothing outside the runs folder is deleted.",
            fix=f"Delete both yourself: `rm -r {shlex.quote(str(target))} {shlex.quote(str(run.path))}`.",
            exit_code=EXIT_USAGE,
        )
    status = read_status(run)
    if status.state in ACTIVE or run.id in run_queue.waiting():
        raise UserError(
            "The run has not ended",
            what=f"{run.name} is {status.state}.",
            fix=f"Stop it first: s on Train, or `qlora-tui stop {run.id}`.",
            exit_code=EXIT_USAGE,
        )
    if is_locked(run.trainer_lock_path):
        raise UserError(
            "The run is in use",
            what=f"{run.name} is being measured, or its trainer is still exiting.",
            fix="Wait until that has ended, and delete it then.",
            exit_code=EXIT_USAGE,
        )


def uses_of(run: RunDir) -> list[str]:
    """Return what uses an ended run, in clauses: who deletes it should say so first."""
    uses = [
        f"{other.name}, which waits in the queue, starts from its adapter"
        for other in map(_run, run_queue.waiting())
        if _starts_from(other, run)
    ]
    if is_exported(run):
        uses.append("it is being exported")
    elif is_held(run.path):
        uses.append("its adapter is loaded for a chat or an export")
    return uses


def _run(run_id: str) -> RunDir:
    return RunDir(paths.runs_dir() / run_id)


def _starts_from(other: RunDir, run: RunDir) -> bool:
    try:
        init_from = other.recipe().lora.init_from
    except (OSError, UserError):
        # A recipe that cannot be read starts no training.
        return False
    return bool(init_from) and Path(init_from).resolve().is_relative_to(run.path.resolve())


@disk_problems()
def delete(run: RunDir) -> None:
    """Delete a run and everything it produced, permanently. Raises UserError until it has ended.

    It leaves the runs folder in one step: if killed midway, the rest is deleted by the next sweep.
    """
    check_deletable(run)
    delete_unfinished(run)
    discard(run.path)
