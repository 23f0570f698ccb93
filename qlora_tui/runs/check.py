"""Checks that every run is intact, and lists repairs: ``qlora-tui runs check [--repair]``.

Runs in training are skipped. The repairs are in :mod:`qlora_tui.runs.repair`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from qlora_tui import paths
from qlora_tui.drafts import kept_earlier
from qlora_tui.errors import UserError
from qlora_tui.files import read_regular
from qlora_tui.recipe.toml import parse, to_recipe
from qlora_tui.runs import leftovers, repair
from qlora_tui.runs.damage import adapter_damage, checkpoint_damage
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import events_and_damage
from qlora_tui.runs.exports import unreadable_exports
from qlora_tui.runs.queue_entries import entries, queue_dir, stray_names
from qlora_tui.runs.repair import CheckResult, Defect, fingerprint
from qlora_tui.runs.status import ACTIVE, State, is_stranded, read_status, status_problem


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
        *_exports(run),
    ]
    return CheckResult(run.id, state, tuple(defects), run=run, seen=seen)


def check_queue() -> CheckResult:
    """Check the queue's folder for names that queue nothing."""
    defects = [
        Defect(
            f"{entry.path.name} queues a run that does not exist",
            "a repair removes it from the queue",
            partial(repair.take_out, entry),
        )
        for entry in entries()
        if not (paths.runs_dir() / entry.run_id).is_dir()
    ]
    defects += [
        Defect(f"{name} is not a queue entry", f"it is ignored; delete {queue_dir() / name}")
        for name in stray_names()
    ]
    return CheckResult("queue", None, tuple(defects))


def check_leftovers() -> CheckResult:
    """List what killed processes left half written."""
    defects = [
        Defect(f"{path} was left by a killed process", "a repair deletes it", partial(repair.delete, path))
        for path in leftovers.leftovers()
    ]
    defects += [
        Defect(f"{path} may be what version 1.0 left half written", "nothing shows that; delete it yourself")
        for path in leftovers.unmarked()
    ]
    return CheckResult("leftovers", None, tuple(defects))


def _moved_aside(run: RunDir) -> Iterator[Defect]:
    for final in leftovers.moved_aside(run):
        earlier = kept_earlier(final)
        if earlier is None:
            continue
        place = earlier.relative_to(final.parent)
        what = f"{final.name} was moved to {place} and the replacement is missing"
        yield Defect(what, "a repair moves it back", partial(repair.put_back, run, final))


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
        remedy = "a repair restores it from an adapter or checkpoint"
        yield Defect(what, remedy, partial(repair.restore_recipe, run, *copy))


def _copies_of_recipe(run: RunDir) -> Iterator[tuple[str, Path]]:
    """Yield each readable copy of the recipe and the file it is in; the adapter's first."""
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
    aside = repair.last_aside(run.events_path)
    if not run.events_path.exists() and aside is not None:
        yield Defect(
            f"events.jsonl is missing, but {aside.name} exists: a repair was interrupted",
            "a repair restores its readable events",
            partial(repair.restore_events, run, aside),
        )
        return
    try:
        damaged = sum(not is_whole for _, is_whole in events_and_damage(run.events_path))
    except OSError as error:
        yield Defect(f"events.jsonl: {error.strerror or error}", "its history is lost; the rest can be used")
        return
    if damaged:
        yield Defect(
            f"events.jsonl has {damaged} damaged {'line' if damaged == 1 else 'lines'}",
            "a repair removes them, and keeps a copy of the original file",
            partial(repair.rewrite_events, run),
        )


def _checkpoints(run: RunDir) -> Iterator[Defect]:
    for step, folder in run.checkpoints():
        damage = checkpoint_damage(folder)
        if damage is not None:
            yield Defect(
                f"checkpoint of step {step}: {damage}",
                "an earlier one is used instead; a repair moves this one aside",
                partial(repair.set_aside, folder),
            )


def _adapter(run: RunDir, state: State) -> Iterator[Defect]:
    if leftovers.moved_aside(run) or not (run.adapter_dir.exists() or state == "finished"):
        return
    damage = adapter_damage(run.adapter_dir) if run.adapter_dir.exists() else "there is none"
    if damage is None:
        return
    if state != "finished":
        yield Defect(
            f"adapter: {damage}", "a repair moves it aside", partial(repair.set_aside, run.adapter_dir)
        )
        return
    whole = [step for step, folder in run.checkpoints() if checkpoint_damage(folder) is None]
    remedy = (
        f"a repair lets `qlora-tui resume {run.id}` write it again from step {whole[-1]}"
        if whole
        else f"a repair lets `qlora-tui resume {run.id}` train it again: no checkpoint is intact"
    )
    yield Defect(f"adapter: {damage}", remedy, partial(repair.reopen, run, damage))


def _exports(run: RunDir) -> Iterator[Defect]:
    for folder in unreadable_exports(run):
        what = f"exports/{folder.name} cannot be read, so no list shows it"
        yield Defect(what, f"what it wrote is whole; delete the record: {folder}")


def _status(run: RunDir) -> Iterator[Defect]:
    problem = status_problem(run)
    if problem is not None and read_status(run).state == "unreadable":
        yield Defect(problem, "there is no recipe to continue with: delete the run")
    elif problem is not None:
        yield Defect(problem, "a repair writes it from the run's events", partial(repair.restore_status, run))
    elif is_stranded(run):
        yield Defect(
            "its status is queued, but it is not in the queue",
            f"`qlora-tui resume {run.id}` queues it; a repair records it as stopped",
            partial(repair.restore_status, run),
        )
