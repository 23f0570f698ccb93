"""Actions on runs, shared by the command line and the app's keys: from submitting to deleting.

A deleted run stays in the trash, ``runs/.deleted/<run id>``, for a week. The trash is inside the runs folder,
so that deleting is a rename on the same disk. The file ``deleted`` in the run's folder has the time of
deletion. A folder without this file was not put there by this program and is never deleted.
"""

from __future__ import annotations

import math
import os
import shlex
import time
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import msgspec

from qlora_tui import paths
from qlora_tui.catalog.adapters import CONFIG
from qlora_tui.errors import UsageError, UserError, disk_problems
from qlora_tui.files import atomic_write, list_folder, private_dir, read_regular, sync
from qlora_tui.gpu.visible_devices import requested_gpus
from qlora_tui.locks import is_held, is_locked
from qlora_tui.publishing import discard
from qlora_tui.recipe.layering import with_absolute_paths
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import load, to_frozen_recipe
from qlora_tui.recipe.validation import InvalidRecipeError
from qlora_tui.remote.calls import at_box, changes_box
from qlora_tui.runs import control, run_queue, slurm_runs
from qlora_tui.runs.directory import LAST, TRASH, RunDir, all_runs, create_run, find_run, match_runs
from qlora_tui.runs.exports import is_exported
from qlora_tui.runs.process import ensure_runner
from qlora_tui.runs.slurm import JobPlan
from qlora_tui.runs.slurm_runs import is_on_cluster
from qlora_tui.runs.status import ACTIVE, RESUMABLE, State, read_status, refuse_other_machines

LONGEST_NAME = 60
KEPT_DAYS = 7
KEPT_S = KEPT_DAYS * 24 * 3600.0
"""Time for which a deleted run can be restored, in seconds."""
_TIME = "deleted"
_CHECK_PERMISSION = "Check that you have write permission there."


@changes_box
@disk_problems()
def submit(recipe: Recipe, *, now: bool = False) -> RunDir:
    """Queue a new run and make sure that a runner is active. The recipe should be ready to run.

    With ``now``, the run trains next, even outside the training hours and while other programs use the GPU.
    """
    refuse_other_machines()
    run = create_run(with_initial_adapter(with_absolute_paths(recipe)), requested_gpus())
    if now:
        run.now_path.touch(mode=0o600)
    run_queue.enqueue(run, first=now)
    ensure_runner()
    return run


@disk_problems()
def submit_job(recipe: Recipe, plan: JobPlan) -> RunDir:
    """Create a run and submit the job that trains it. If this raises UserError, no run was created."""
    run = create_run(with_initial_adapter(with_absolute_paths(recipe)))
    try:
        slurm_runs.submit(run, plan.name, plan.target, plan.limit_s)
    except UserError:
        discard(run.path)
        raise
    return run


@disk_problems()
def prepare(recipe: Recipe) -> RunDir:
    """Create a run without queueing it, for a trainer that the user starts."""
    run = create_run(with_initial_adapter(with_absolute_paths(recipe)), requested_gpus())
    run_queue.mark_not_queued(run, "Not queued: start it with the command that `--print-command` printed.")
    return run


@changes_box
@disk_problems()
def resume(run: RunDir) -> None:
    """Queue an ended run again, to continue from its last checkpoint, or from the start if it has none."""
    status = read_status(run)
    if status.state not in RESUMABLE:
        raise UsageError(
            "Nothing to resume",
            what=f"{run.id} is {status.state}.",
            fix=_instead_of_resuming(run, status.state),
        )
    if is_on_cluster(run):
        slurm_runs.resubmit(run)
        return
    refuse_other_machines()
    if gpu := requested_gpus():
        atomic_write(run.gpu_path, f"{gpu}\n", durable=True)
    has_reached = status.step >= (run.pause_at or 1) * (status.total_steps or math.inf)
    if has_reached or not _is_compared(run):
        # A user who resumes a trial wants it to train beyond the step at which its sweep paused it.
        run.set_pause_at(None)
    run_queue.requeue(run)
    ensure_runner()


def _is_compared(run: RunDir) -> bool:
    """Return whether the run is a trial of a sweep that has not ended."""
    return bool(run.sweep) and (paths.sweeps_dir() / run.sweep / "active").exists()


def _instead_of_resuming(run: RunDir, state: State) -> str:
    if state == "finished":
        return (
            f"The run has completed all of its steps. Chat with it: `qlora-tui chat {run.id}`. "
            f"To train its adapter further: `qlora-tui train {shlex.quote(str(run.recipe_path))} "
            f"--init-from {run.id}`."
        )
    if state in ACTIVE or state == "queued":
        return f"The run does not need to be resumed. Watch it: `qlora-tui attach {run.id}`."
    return "Only failed, stopped, paused and lost runs can be resumed."


@at_box
def initial_adapter(init_from: str) -> Path:
    """Return the absolute folder of the adapter that ``lora.init_from`` names.

    Args:
        init_from: A folder with an adapter, a run's folder, or the id or name of a run.

    Raises:
        UserError: There is no such adapter, the run has not saved one yet, or the adapter's recipe has
            settings under ``[lora]`` that this version does not know.
    """
    folder = _folder_of(init_from)
    recipe_of_adapter(folder)
    return folder


def _folder_of(init_from: str) -> Path:
    folder = Path(init_from).expanduser()
    if (folder / CONFIG).is_file():
        return folder.resolve()
    if folder.is_dir():
        run = RunDir(folder.resolve())
        if not run.recipe_path.is_file():
            raise _missing(init_from, f"{folder} does not contain {CONFIG}.")
    elif folder.is_absolute():
        raise _missing(init_from, f"{folder} does not exist.")
    else:
        run = find_run(init_from)
    if not (run.adapter_dir / CONFIG).is_file():
        raise _missing(init_from, f"{run.id} has not saved an adapter.")
    return run.adapter_dir


def with_initial_adapter(recipe: Recipe) -> Recipe:
    """Return the recipe with the adapter's absolute folder as ``lora.init_from``. Raises UserError."""
    if not recipe.lora.init_from:
        return recipe
    folder = initial_adapter(recipe.lora.init_from)
    lora = msgspec.structs.replace(recipe.lora, init_from=str(folder))
    return msgspec.structs.replace(recipe, lora=lora)


def recipe_of_adapter(folder: Path) -> Recipe | None:
    """Return the recipe that trained the adapter or checkpoint in ``folder``; None if it is unknown.

    Raises InvalidRecipeError if its settings under ``[lora]`` cannot be read.
    """
    run = RunDir(folder.parent.parent)
    path = run.recipe_path if folder.parent == run.checkpoints_dir else folder / "recipe.toml"
    try:
        return to_frozen_recipe(load(path), origin=str(path))
    except InvalidRecipeError as error:
        if any(issue.path.startswith("lora.") for issue in error.issues):
            raise
        return None
    except UserError:
        return None


def _missing(init_from: str, what: str) -> UserError:

    fix = "Specify a finished run or the folder of an adapter, such as a checkpoint."
    for each in trashed_runs():
        if each.run.id in (init_from, *Path(init_from).parts):
            what = f"{what} {each.run.name} is in the trash."
            fix = f"`qlora-tui runs restore {each.run.id}` restores it."
    return UsageError(
        "No adapter to start from",
        what=f"“Start from” (lora.init_from) is {init_from!r}: {what}",
        fix=fix,
    )


@changes_box
@disk_problems()
def stop(run: RunDir, *, now: bool = False) -> None:
    """Stop a run: remove it from the queue, or make its trainer save a checkpoint and the adapter and exit.

    With ``now``, the step or evaluation in progress is abandoned instead of completed.
    """
    is_taken_back = slurm_runs.cancel(run, pauses=False) if is_on_cluster(run) else run_queue.cancel(run)
    if not is_taken_back:
        control.send_request(run, "stop_now" if now else "stop")


@changes_box
@disk_problems()
def pause(run: RunDir) -> None:
    """Make the trainer save a checkpoint and free the GPU; ``resume`` continues the run.

    A run on hold has done this already. Pausing it means that it no longer continues by itself.
    """
    if is_on_cluster(run):
        is_taken_back = slurm_runs.cancel(run, pauses=True)
    else:
        is_taken_back = read_status(run).hold is not None and run_queue.pause(run)
    if not is_taken_back:
        control.send_request(run, "pause")


@changes_box
@disk_problems()
def train_now(run: RunDir) -> None:
    """Make a run the next to train, and let it train to its end, even outside the training hours and while
    other programs use the GPU.

    Raises UserError for a run that cannot be resumed.
    """
    if is_on_cluster(run):
        raise UsageError(
            "Slurm decides when the run trains",
            what=f"{run.id} is on a cluster, where Slurm chooses the time of each job.",
            fix=f"Wait until its job has ended. Then `qlora-tui resume {run.id}` submits it again.",
        )
    run.now_path.touch(mode=0o600)
    if read_status(run).state not in ("queued", *ACTIVE):
        try:
            resume(run)
        except UserError:
            run.now_path.unlink()
            raise
    run_queue.move(run, -len(run_queue.waiting()))
    ensure_runner()


@changes_box
@disk_problems()
def rename(run: RunDir, name: str) -> None:
    """Rename a run; its id stays. Raises UserError if the name is invalid or belongs to another run."""
    wrong = validate_name(name) or _taken(run, name.strip())
    if wrong:
        raise UsageError(
            "Invalid run name",
            what=wrong,
            fix=f"Choose another name: one line of at most {LONGEST_NAME} characters.",
        )
    atomic_write(run.name_path, f"{name.strip()}\n", durable=True)


def validate_name(name: str) -> str:
    """Return what is wrong with a run name, in a sentence; empty if the name is valid."""
    if not name.strip() or not name.strip().isprintable():
        return "A name must be a single, non-empty line."
    if name.strip() == LAST:
        return f"`{LAST}` stands for the newest run."
    return f"The name is longer than {LONGEST_NAME} characters." if len(name.strip()) > LONGEST_NAME else ""


def _taken(run: RunDir, name: str) -> str:
    others = (other for other in all_runs() if other.id != run.id)
    return next(
        (f"{other.id} already has this name." for other in others if name in (other.id, other.name)), ""
    )


@at_box
def check_deletable(run: RunDir) -> None:
    """Raise UserError if the run must not be deleted.

    This is the case while it is queued, trains or is measured, and if its folder is a link to another folder.
    """
    if run.path.is_symlink():
        target = run.path.resolve()
        raise UsageError(
            "The run is outside the runs folder",
            what=f"{run.path} is a link to {target}.",
            why="Nothing outside the runs folder is deleted.",
            fix="Delete the folder and the link yourself: "
            f"`rm -r {shlex.quote(str(target))} {shlex.quote(str(run.path))}`.",
        )
    status = read_status(run)
    if status.state in ("queued", *ACTIVE) or run.id in run_queue.waiting():
        raise UsageError(
            "The run has not ended",
            what=f"{run.name} is {status.state}.",
            fix=f"Stop it first: press Z on the Train screen, or run `qlora-tui stop {run.id}`.",
        )
    if is_locked(run.trainer_lock_path):
        raise UsageError(
            "The run is in use",
            what=f"{run.name} is being measured, or its trainer is still exiting.",
            fix="Wait until its measurement or its trainer has ended, then delete the run.",
        )


@at_box
def uses_of(run: RunDir) -> list[str]:
    """Return descriptions of what uses an ended run, as clauses to show before the run is deleted."""
    uses = [
        f"{other.name}, which is queued, starts from this run's adapter"
        for other in (RunDir(paths.runs_dir() / name) for name in run_queue.waiting())
        if _starts_from(other, run)
    ]
    if _is_compared(run):
        uses.append(f"the sweep {run.sweep}, which has not ended, compares it with other runs")
    if is_exported(run):
        uses.append("it is being exported")
    elif is_held(run.path):
        uses.append("its adapter is loaded for a chat or an export")
    return uses


def _starts_from(other: RunDir, run: RunDir) -> bool:
    try:
        init_from = other.recipe().lora.init_from
    except (OSError, UserError):
        # A recipe that cannot be read cannot start a training.
        return False
    return bool(init_from) and Path(init_from).resolve().is_relative_to(run.path.resolve())


@changes_box
@disk_problems()
def delete(run: RunDir) -> None:
    """Delete an ended run and everything it produced, permanently. Raises UserError if it has not ended.

    The run leaves the runs folder in one step. If this process is killed before all files are deleted, the
    next cleanup of leftovers deletes the rest.
    """
    check_deletable(run)
    discard(run.path)


@dataclass(frozen=True)
class TrashedRun:
    """A deleted run that can be restored."""

    run: RunDir
    """The run, with its folder in the trash."""
    deleted_at: float
    """Unix time of the deletion."""

    @property
    def age_s(self) -> float:
        """Seconds since the deletion; 0 if the clock was set back."""
        return max(0.0, time.time() - self.deleted_at)

    @property
    def size_bytes(self) -> int:
        """Disk space of the run in bytes. Files that cannot be read count as 0."""
        size = 0
        for folder, _, names in os.walk(self.run.path):
            for name in names:
                with suppress(OSError):
                    size += (Path(folder) / name).lstat().st_size
        return size


@changes_box
def move_to_trash(run: RunDir) -> None:
    """Move an ended run to the trash. Raises UserError if it has not ended, or on a disk error."""
    check_deletable(run)
    trashed = private_dir(_home()) / run.id
    with disk_problems("The run was not deleted", run.path, _CHECK_PERMISSION):
        try:
            atomic_write(run.path / _TIME, f"{int(time.time())}\n")
            run.path.rename(trashed)
            sync(trashed.parent)
            sync(run.path.parent)
        except OSError:
            with suppress(OSError):
                (run.path / _TIME).unlink(missing_ok=True)
            raise


@at_box
def trashed_runs() -> list[TrashedRun]:
    """Return every run that can be restored, the most recently deleted first."""
    return sorted(
        (TrashedRun(RunDir(path), _deleted_at(path)) for path in list_folder(_home()) if _is_run(path)),
        key=lambda each: each.deleted_at,
        reverse=True,
    )


@at_box
def trash_bytes() -> int:
    """Return the disk space of all runs in the trash, in bytes."""
    return sum(trashed.size_bytes for trashed in trashed_runs())


@changes_box
def restore_run(run_id: str) -> RunDir:
    """Move a run out of the trash, given its id, its name or the beginning of either. Raises UserError."""
    trashed = _find(run_id)
    run = RunDir(paths.runs_dir() / trashed.id)
    if os.path.lexists(run.path):
        raise UserError(
            "The run was not restored", what=f"{run.path} already exists.", fix="Rename that folder."
        )
    with disk_problems("The run was not restored", run.path, _CHECK_PERMISSION):
        trashed.path.rename(run.path)
        sync(run.path.parent)
    # The file has a meaning only in the trash.
    with suppress(OSError):
        (run.path / _TIME).unlink(missing_ok=True)
    return run


@changes_box
def empty_trash(older_than_s: float = 0.0) -> list[TrashedRun]:
    """Permanently delete the runs in the trash that are older than ``older_than_s``, and return them.

    The age counts from the deletion; the default deletes runs of any age. Runs that cannot be deleted stay in
    the trash, as do runs without a recorded time of deletion.
    """
    deleted = []
    for trashed in trashed_runs():
        if not (trashed.run.path / _TIME).is_file():
            continue  # not put there by this program
        if older_than_s and trashed.age_s <= older_than_s:
            continue
        with suppress(OSError):
            discard(trashed.run.path)
            deleted.append(trashed)
    return deleted


def _find(run_id: str) -> RunDir:
    matches = match_runs([each.run for each in trashed_runs()], run_id)
    if len(matches) == 1:
        return matches[0]
    what = (
        f"The ids or names of {len(matches)} deleted runs begin with '{run_id}'."
        if matches
        else f"'{run_id}' is not in the trash."
    )
    raise UsageError("Not in the trash", what=what, fix="`qlora-tui runs trash` lists the runs in the trash.")


def _is_run(path: Path) -> bool:
    is_run = (path / _TIME).is_file() or RunDir(path).recipe_path.exists()
    return path.is_dir() and not path.name.startswith(".") and is_run


def _deleted_at(path: Path) -> float:
    with suppress(OSError, ValueError):
        if isfinite(deleted_at := float(read_regular(path / _TIME, 64))):
            return deleted_at
    # A rename changes this time.
    return path.lstat().st_ctime


def _home() -> Path:
    return paths.runs_dir() / TRASH
