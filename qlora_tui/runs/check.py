"""Checks that every run is intact, and repairs damage: ``qlora-tui runs check [--repair]``.

Runs in training are skipped. A repair deletes only what killed processes left incomplete. Damaged files are
moved aside and get a name that says so. A replacement is on disk before it takes the place of the original
file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import TypeAlias

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write, read_regular, sync
from qlora_tui.locks import PATIENCE_S, locked
from qlora_tui.publishing import kept_earlier
from qlora_tui.recipe.toml import parse, to_recipe
from qlora_tui.runs import leftovers, run_queue
from qlora_tui.runs.damage import adapter_damage, checkpoint_damage
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import append_event, events_and_damage
from qlora_tui.runs.events import Failed
from qlora_tui.runs.exports import unreadable_exports
from qlora_tui.runs.outcomes import determine_outcome, record_outcome
from qlora_tui.runs.status import ACTIVE, State, is_stranded, read_status, status_problem, write_status

_DAMAGED = "damaged-"
"""Name prefix of files and folders that were moved aside."""
Fingerprint: TypeAlias = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Defect:
    """One defect of a run or of the shared files."""

    what: str
    """What is wrong, in a clause: ``adapter: adapter_model.safetensors is missing``."""
    remedy: str
    """What the user can do or what the repair does, in a clause."""
    repair: Callable[[], object] | None = field(default=None, compare=False)
    """Performs the repair. Raises OSError or UserError."""
    done: str = field(default="", compare=False)
    """What the repair did, in a clause; empty if ``repair`` returns the clause instead."""


@dataclass(frozen=True)
class CheckResult:
    """Result of checking one run, or the files that runs share."""

    name: str
    state: State | None
    """State of the run; None if the result is not about a run."""
    defects: tuple[Defect, ...] = ()
    in_training: bool = False
    """Whether the run was skipped because it is in training."""
    run: RunDir | None = field(default=None, compare=False)
    """The run to repair; None if it was skipped, or if the result is not about a run."""
    seen: Fingerprint = field(default=(), compare=False)
    """Fingerprint of the run's files before the check."""


def check_run(run: RunDir) -> CheckResult:
    """Check all of a run's files, and read every adapter and checkpoint in full."""
    seen = fingerprint(run)
    state = read_status(run).state
    if state in ACTIVE:
        return CheckResult(run.id, state, in_training=True)
    defects = [
        *_moved_aside(run),
        *_recipe(run),
        *_events(run),
        *_checkpoints(run),
        *_adapter(run, state),
        *_status(run),
        *_measurements(run),
        *_exports(run),
    ]
    return CheckResult(run.id, state, tuple(defects), run=run, seen=seen)


def _moved_aside(run: RunDir) -> Iterator[Defect]:
    for final in leftovers.moved_aside(run):
        earlier = kept_earlier(final)
        if earlier is None:
            continue
        place = earlier.relative_to(final.parent)
        what = f"{final.name} was moved to {place} and the replacement is missing"
        restore = partial(leftovers.restore, run)
        yield Defect(what, "a repair moves it back", restore, f"put {final.name} back")


def _recipe(run: RunDir) -> Iterator[Defect]:
    try:
        if run.recipe().model.id:
            return
        what = "recipe.toml names no model: a power cut may have emptied it"
    except UserError as problem:
        what = f"recipe.toml: {problem.what.rstrip('.')}"
    copy = next(_copies_of_recipe(run), None)
    if copy is None:
        yield Defect(what, "no adapter or checkpoint has a copy: start a new run")
    else:
        remedy = "a repair restores it from an adapter or checkpoint"
        text, origin = copy
        keep = _place_aside(run.recipe_path) if run.recipe_path.exists() else None
        restore = partial(atomic_write, run.recipe_path, text, durable=True, keep=keep)
        yield Defect(what, remedy, restore, f"restored recipe.toml from {origin.relative_to(run.path)}")


def _copies_of_recipe(run: RunDir) -> Iterator[tuple[str, Path]]:
    """Yield each readable copy of the recipe with its file, starting with the adapter's copy."""
    checkpoints = [folder / "state.json" for _, folder in reversed(run.checkpoints())]
    for file in (run.adapter_dir / "recipe.toml", *checkpoints):
        try:
            text = read_regular(file).decode()
            if file.suffix == ".json":
                text = str(json.loads(text)["recipe"])
            to_recipe(parse(text, str(file)), origin=str(file))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError):
            continue
        yield text, file


def _events(run: RunDir) -> Iterator[Defect]:
    aside = last_aside(run.events_path)
    if not run.events_path.exists() and aside is not None:
        yield Defect(
            f"events.jsonl is missing, but {aside.name} exists: a repair was interrupted",
            "a repair restores its readable events",
            partial(_write_whole_events, run, aside),
            f"restored events.jsonl from {aside.name}",
        )
        return
    try:
        damaged = sum(not is_whole for _, is_whole in events_and_damage(run.events_path))
    except OSError as error:
        yield Defect(
            f"events.jsonl: {error.strerror or error}",
            "the run's history is lost; its other files can be used",
        )
        return
    if damaged:
        yield Defect(
            f"events.jsonl has {damaged} damaged {'line' if damaged == 1 else 'lines'}",
            "a repair removes damaged lines, and keeps a copy of the original file",
            partial(_write_whole_events, run, run.events_path, keep := _place_aside(run.events_path)),
            f"removed damaged lines; the original file is {keep.name}",
        )


def _write_whole_events(run: RunDir, origin: Path, keep: Path | None = None) -> None:
    """Write the events of ``origin`` without damaged lines; the current event file is renamed to ``keep``."""
    content = b"".join(line for line, _ in events_and_damage(origin))
    atomic_write(run.events_path, content, durable=True, keep=keep)


def _checkpoints(run: RunDir) -> Iterator[Defect]:
    for step, folder in run.checkpoints():
        damage = checkpoint_damage(folder)
        if damage is not None:
            yield Defect(
                f"checkpoint of step {step}: {damage}",
                "an earlier checkpoint is used instead; a repair moves the damaged one aside",
                partial(move_aside, folder),
                f"moved it to {_place_aside(folder).name}",
            )


def _adapter(run: RunDir, state: State) -> Iterator[Defect]:
    if leftovers.moved_aside(run) or not (run.adapter_dir.exists() or state == "finished"):
        return
    damage = adapter_damage(run.adapter_dir) if run.adapter_dir.exists() else "the folder is missing"
    if damage is None:
        return
    if state != "finished":
        move, place = partial(move_aside, run.adapter_dir), _place_aside(run.adapter_dir).name
        yield Defect(f"adapter: {damage}", "a repair moves it aside", move, f"moved it to {place}")
        return
    whole = [step for step, folder in run.checkpoints() if checkpoint_damage(folder) is None]
    remedy = (
        f"after a repair, `qlora-tui resume {run.id}` writes it again from step {whole[-1]}"
        if whole
        else f"after a repair, `qlora-tui resume {run.id}` trains it again: no checkpoint is intact"
    )
    yield Defect(f"adapter: {damage}", remedy, partial(reopen, run, damage))


def reopen(run: RunDir, damage: str) -> str:
    """Turn a finished run into a failed run, so that it can be resumed; return a description."""
    if run.adapter_dir.exists():
        move_aside(run.adapter_dir)
    resume = f"`qlora-tui resume {run.id}`"
    lost = Failed(
        title="The adapter was lost",
        what=f"The run finished, but its adapter was later found to be damaged: {damage}.",
        fix=f"{resume} writes it again from the last checkpoint.",
        kind="lost",
    )
    append_event(run.events_path, lost)
    write_status(run, read_status(run).transition("failed", detail=f"{lost.title}: {lost.what}"))
    return f"{resume} can now write it again"


def _status(run: RunDir) -> Iterator[Defect]:
    problem = status_problem(run)
    if problem is not None and read_status(run).state == "unreadable":
        yield Defect(problem, "there is no recipe to continue with: delete the run")
    elif problem is not None:
        yield Defect(problem, "a repair writes it from the run's events", partial(restore_status, run))
    elif is_stranded(run):
        yield Defect(
            "the status is queued, but the run is not in the queue",
            f"`qlora-tui resume {run.id}` queues it; a repair records it as stopped",
            partial(restore_status, run),
        )


def restore_status(run: RunDir) -> str:
    """Write the status that follows from the run's events."""
    status = read_status(run)
    if status.state == "lost":
        record_outcome(run, determine_outcome(run, None))
    elif is_stranded(run):
        run_queue.mark_not_queued(run, "The run's status was queued, but the run was not in the queue.")
    else:
        write_status(run, status)
    return f"its state is now {read_status(run).state}"


def _measurements(run: RunDir) -> Iterator[Defect]:
    commands = {run.task_evaluation_path: "evaluate", run.row_losses_path: "data blame"}
    for path, command in commands.items():
        try:
            if path.exists():
                json.loads(read_regular(path))
        except (OSError, ValueError, RecursionError) as error:
            yield Defect(
                f"{path.name} cannot be read: {error}",
                f"a repair moves it aside; `qlora-tui {command} {run.id}` measures again",
                partial(move_aside, path),
                f"moved it to {_place_aside(path).name}",
            )


def _exports(run: RunDir) -> Iterator[Defect]:
    for folder in unreadable_exports(run):
        what = f"exports/{folder.name} cannot be read, so no list shows it"
        yield Defect(what, f"the exported files are intact; delete the record: {folder}")


def check_queue() -> CheckResult:
    """Check the queue for runs that do not exist."""
    defects = [
        Defect(
            f"{name} is queued, but its folder does not exist",
            "a repair removes it from the queue",
            partial(run_queue.remove, RunDir(paths.runs_dir() / name)),
            "removed from the queue",
        )
        for name in run_queue.waiting()
        if not (paths.runs_dir() / name).is_dir()
    ]
    return CheckResult("queue", None, tuple(defects))


def check_leftovers() -> CheckResult:
    """Return a check result for the incomplete files that killed processes left behind."""
    defects = [
        Defect(what, "a repair deletes it", partial(leftovers.delete, path), "deleted")
        for path in leftovers.leftovers()
        if (what := f"{path} was left by a killed process")
    ]
    return CheckResult("leftovers", None, tuple(defects))


def apply_repairs(
    checked: CheckResult, check_again: Callable[[], CheckResult]
) -> tuple[CheckResult, list[str]]:
    """Repair what can be repaired; return the result of a second check, and what was done, in clauses.

    During the repair the run is held, so that no trainer starts on it. A run that has changed since the first
    check is skipped. If a repair fails, its clause says why, and the second check reports the defect again.
    """
    repairs = [defect for defect in checked.defects if defect.repair is not None]
    if not repairs:
        return checked, []
    try:
        with _held(checked) as refusal:
            done = [f"left alone: {refusal}"] if refusal else _apply(repairs)
    except (OSError, UserError) as error:
        done = [f"could not repair {checked.name}: {_reason(error)}"]
    return check_again(), done


@contextmanager
def _held(checked: CheckResult) -> Iterator[str]:
    """Keep trainers and the queue away from a run inside the block.

    Yields why the run cannot be repaired now; empty if it can.
    """
    run = checked.run
    if run is None:
        yield ""
        return
    with locked(run.trainer_lock_path, patience_s=PATIENCE_S) as alone, run_queue.queue_lock():
        state = read_status(run).state
        if state in ("queued", *ACTIVE) and not is_stranded(run):
            yield f"it is {state}"
        elif alone is None:
            yield "a trainer still uses the run"
        elif fingerprint(run) != checked.seen:
            yield "the run has changed since it was checked"
        else:
            yield ""


def fingerprint(run: RunDir) -> Fingerprint:
    """Return name, inode, size and time of the run's files and checkpoints, which every repair changes."""
    files: list[tuple[str, int, int, int]] = []
    for folder in (run.path, run.checkpoints_dir):
        with suppress(OSError), os.scandir(folder) as listed:
            for entry in listed:
                if entry.name != run.trainer_lock_path.name:
                    stat = entry.stat(follow_symlinks=False)
                    files.append((entry.path, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(sorted(files))


def _apply(defects: list[Defect]) -> list[str]:
    done = []
    for defect in defects:
        assert defect.repair is not None
        try:
            outcome = defect.repair()
            done.append(defect.done or str(outcome))
        except (OSError, UserError) as error:
            done.append(f"could not repair {defect.what}: {_reason(error)}")
    return done


def _reason(error: OSError | UserError) -> str:
    return error.title if isinstance(error, UserError) else error.strerror or str(error)


def last_aside(path: Path) -> Path | None:
    """Return the path to which a file or folder was last moved aside; None if it never was."""
    asides = (path.with_name(name) for name in _names_aside(path))
    return max(takewhile(Path.exists, asides), key=lambda aside: aside.stat().st_ctime_ns, default=None)


def move_aside(path: Path) -> Path:
    """Rename a file or folder within its folder, durably; return its new path."""
    aside = _place_aside(path)
    path.rename(aside)
    sync(path.parent)
    return aside


def _place_aside(path: Path) -> Path:
    """Return the first unused name for moving ``path`` aside within its folder."""
    return next(aside for name in _names_aside(path) if not (aside := path.with_name(name)).exists())


def _names_aside(path: Path) -> Iterator[str]:
    yield f"{_DAMAGED}{path.name}"
    yield from (f"{_DAMAGED}{number}-{path.name}" for number in count(2))
