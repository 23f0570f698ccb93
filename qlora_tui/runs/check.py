"""Whether every run is whole, and what can be done where one is not: ``qlora-tui runs check [--repair]``.

A repair deletes nothing of a run but what killed processes left half written: what is damaged is moved aside,
under a name that says so. Runs in training are left alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write, earlier_folder, sync
from qlora_tui.recipe.toml import parse, to_recipe
from qlora_tui.runs import leftovers, run_queue
from qlora_tui.runs.damage import adapter_damage, checkpoint_damage
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Failed, decode
from qlora_tui.runs.outcomes import determine_outcome, record_outcome
from qlora_tui.runs.queue_entries import Entry, entries, queue_dir, stray_names
from qlora_tui.runs.status import ACTIVE, State, is_stranded, read_status, status_problem, write_status

_DAMAGED = "damaged-"
"""Before the name of what is moved aside."""


@dataclass(frozen=True)
class Defect:
    """Something that is not as it should be."""

    what: str
    """A clause: ``adapter: adapter_model.safetensors is missing``."""
    remedy: str
    """A clause: what the user can do, or what a repair does."""
    repair: Callable[[], str] | None = field(default=None, compare=False)
    """Does what can be done, and says what that was, in a clause. Raises OSError or UserError."""


@dataclass(frozen=True)
class CheckResult:
    """What a check says of one run, or of what all share."""

    name: str
    state: State | None
    """None for what is no run."""
    defects: tuple[Defect, ...] = ()
    in_training: bool = False
    """It was left alone."""


def check_run(run: RunDir) -> CheckResult:
    """Look at everything a run keeps, and read every adapter and checkpoint of it."""
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
    ]
    return CheckResult(run.id, state, tuple(defects))


def check_queue() -> CheckResult:
    """Look for names in the queue's folder that queue nothing."""
    defects = [
        Defect(
            f"{entry.path.name} queues a run that is not there",
            "a repair takes it out",
            partial(_take_out, entry),
        )
        for entry in entries()
        if not (paths.runs_dir() / entry.run_id).is_dir()
    ]
    defects += [
        Defect(f"{name} is no place in the queue", f"it is ignored; delete {queue_dir() / name}")
        for name in stray_names()
    ]
    return CheckResult("queue", None, tuple(defects))


def check_leftovers() -> CheckResult:
    """Look for what killed processes left half written, an hour ago or longer."""
    defects = (
        Defect(f"{path} was left by a killed process", "a repair deletes it", partial(_delete, path))
        for path in leftovers.leftovers()
    )
    return CheckResult("leftovers", None, tuple(defects))


def apply_repairs(
    checked: CheckResult, check_again: Callable[[], CheckResult]
) -> tuple[CheckResult, list[str]]:
    """Repair what can be repaired; what a second check says, and what was done, in clauses.

    A repair that fails says why, and leaves its defect to the second check.
    """
    done = []
    for defect in checked.defects:
        if defect.repair is not None:
            try:
                done.append(defect.repair())
            except (OSError, UserError) as error:
                reason = error.title if isinstance(error, UserError) else error.strerror or str(error)
                done.append(f"could not repair {defect.what}: {reason}")
    return (check_again() if done else checked), done


def _moved_aside(run: RunDir) -> Iterator[Defect]:
    for final in leftovers.moved_aside(run):
        what = f"{final.name} was moved to {earlier_folder(final).name} for a new one that never came"
        yield Defect(what, "a repair puts it back", partial(_put_back, run, final))


def _put_back(run: RunDir, final: Path) -> str:
    leftovers.restore(run)
    return f"put {final.name} back"


def _recipe(run: RunDir) -> Iterator[Defect]:
    try:
        if run.recipe().model.id:
            return
        what = "recipe.toml names no model: a power cut may have emptied it"
    except UserError as problem:
        what = f"recipe.toml: {problem.what.rstrip('.')}"
    copy = next(_copies_of_recipe(run), None)
    if copy is None:
        yield Defect(what, "neither adapter nor checkpoint has a copy: start a new run")
    else:
        remedy = "a repair takes the copy kept with its adapter or checkpoint"
        yield Defect(what, remedy, partial(_restore_recipe, run, *copy))


def _copies_of_recipe(run: RunDir) -> Iterator[tuple[str, Path]]:
    """Each copy of the recipe that can be read, and the file it is in; the adapter's first."""
    checkpoints = [folder / "state.json" for _, folder in reversed(run.checkpoints())]
    for file in (run.adapter_dir / "recipe.toml", *checkpoints):
        try:
            text = file.read_text("utf-8")
            if file.suffix == ".json":
                text = str(json.loads(text)["recipe"])
            to_recipe(parse(text, str(file)), origin=str(file))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError):
            continue
        yield text, file


def _restore_recipe(run: RunDir, text: str, origin: Path) -> str:
    if run.recipe_path.exists():
        _move_aside(run.recipe_path)
    atomic_write(run.recipe_path, text, durable=True)
    return f"restored recipe.toml from {origin.relative_to(run.path)}"


def _events(run: RunDir) -> Iterator[Defect]:
    try:
        damaged = sum(not is_whole for _, is_whole in _event_lines(run))
    except OSError as error:
        yield Defect(f"events.jsonl: {error.strerror or error}", "its history is lost; the rest can be used")
        return
    if damaged:
        yield Defect(
            f"events.jsonl has {damaged} damaged {'line' if damaged == 1 else 'lines'}",
            "a repair leaves them out, and keeps the file as it was beside it",
            partial(_rewrite_events, run),
        )


def _event_lines(run: RunDir) -> Iterator[tuple[bytes, bool]]:
    """What can be read of each line, and whether that is all of it. A torn last line is none."""
    with run.events_path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                # A power cut leaves zeros where content had not reached the disk.
                clean = line.lstrip(b"\0")
                is_event = _is_json_object(clean)
                yield (clean if is_event else b""), is_event and clean == line


def _is_json_object(line: bytes) -> bool:
    if decode(line) is not None:
        return True
    try:
        # An event of another version is not damaged.
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _rewrite_events(run: RunDir) -> str:
    content = b"".join(line for line, _ in _event_lines(run))
    aside = _move_aside(run.events_path)
    atomic_write(run.events_path, content, durable=True)
    return f"left them out; the file as it was is {aside.name}"


def _checkpoints(run: RunDir) -> Iterator[Defect]:
    for step, folder in run.checkpoints():
        damage = checkpoint_damage(folder)
        if damage is not None:
            yield Defect(
                f"checkpoint of step {step}: {damage}",
                "an earlier one is used; a repair moves this one aside",
                partial(_set_aside, folder),
            )


def _set_aside(folder: Path) -> str:
    return f"moved it to {_move_aside(folder).name}"


def _adapter(run: RunDir, state: State) -> Iterator[Defect]:
    if leftovers.moved_aside(run) or not (run.adapter_dir.exists() or state == "finished"):
        return
    damage = adapter_damage(run.adapter_dir) if run.adapter_dir.exists() else "there is none"
    if damage is None:
        return
    if state != "finished":
        yield Defect(f"adapter: {damage}", "a repair moves it aside", partial(_set_aside, run.adapter_dir))
        return
    whole = [step for step, folder in run.checkpoints() if checkpoint_damage(folder) is None]
    remedy = (
        f"a repair lets `qlora-tui resume {run.id}` write it again from step {whole[-1]}"
        if whole
        else f"a repair lets `qlora-tui resume {run.id}` train it again: no checkpoint is whole"
    )
    yield Defect(f"adapter: {damage}", remedy, partial(_reopen, run, damage))


def _reopen(run: RunDir, damage: str) -> str:
    """Make a finished run one that failed, so that it can be resumed."""
    if run.adapter_dir.exists():
        _move_aside(run.adapter_dir)
    resume = f"`qlora-tui resume {run.id}`"
    lost = Failed(
        at=time.time(),
        title="The adapter was lost",
        what=f"After the run had finished, its adapter was found damaged: {damage}.",
        fix=f"{resume} writes it again from the last checkpoint.",
        kind="lost",
    )
    with EventWriter(run.events_path) as log:
        log.append(lost)
    write_status(run, read_status(run).transition("failed", detail=f"{lost.title}: {lost.what}"))
    return f"{resume} writes it again now"


def _status(run: RunDir) -> Iterator[Defect]:
    problem = status_problem(run)
    if problem is not None and read_status(run).state == "unreadable":
        yield Defect(problem, "there is no recipe to go on with: delete the run")
    elif problem is not None:
        yield Defect(problem, "a repair writes it from the run's events", partial(_restore_status, run))
    elif is_stranded(run):
        yield Defect(
            "it says queued and is not in the queue",
            f"`qlora-tui resume {run.id}` queues it; a repair records it as stopped",
            partial(_restore_status, run),
        )


def _restore_status(run: RunDir) -> str:
    status = read_status(run)
    if status.state == "lost":
        record_outcome(run, determine_outcome(run, None))
    elif is_stranded(run):
        run_queue.mark_not_queued(run, "It was queued and was not in the queue.")
    else:
        write_status(run, status)
    return f"it is {read_status(run).state} now"


def _take_out(entry: Entry) -> str:
    run_queue.remove(RunDir(paths.runs_dir() / entry.run_id))
    return "taken out"


def _delete(path: Path) -> str:
    leftovers.delete(path)
    return "deleted"


def _move_aside(path: Path) -> Path:
    """Rename a file or folder within its folder, durably; its new path."""
    number, aside = 1, path.with_name(f"{_DAMAGED}{path.name}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{_DAMAGED}{number}-{path.name}")
    path.rename(aside)
    sync(path.parent)
    return aside
