"""Deleting and bringing back, across apps that live and that were killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.locks import hold_folder
from qlora_tui.recipe.schema import Lora, Recipe
from qlora_tui.runs import actions, run_queue
from qlora_tui.runs.directory import RunDir, all_runs, create_run
from qlora_tui.runs.status import Status, write_status

DELETES = """
import os, signal, sys
from pathlib import Path
from qlora_tui.runs import actions
from qlora_tui.runs.directory import RunDir
actions.move_to_trash(RunDir(Path(sys.argv[1])))
os.kill(os.getpid(), signal.SIGKILL)
"""


def ended(recipe: Recipe) -> RunDir:
    run = create_run(recipe)
    write_status(run, Status(state="stopped", at=1.0))
    return run


def test_what_was_deleted_last_is_listed_first(recipe: Recipe) -> None:
    first, second = ended(recipe), ended(recipe)
    for run, at in ((first, 1e9), (second, 2e9)):
        actions.move_to_trash(run)
        (paths.runs_dir() / ".deleted" / run.id / "deleted").write_text(f"{at}")
    assert all_runs() == []
    assert [each.run.id for each in actions.trashed_runs()] == [second.id, first.id]
    assert all(each.size_bytes > 0 for each in actions.trashed_runs())
    assert (
        {actions.restore_run(second.id), actions.restore_run(first.name)}
        == {first, second}
        == set(all_runs())
    )
    assert not (first.path / "deleted").exists()


def test_a_deleted_runs_id_is_not_reused(recipe: Recipe) -> None:
    run = ended(recipe)
    actions.move_to_trash(run)
    assert create_run(recipe).id != run.id
    assert actions.restore_run(run.id) == run


def test_a_waiting_run_is_not_deleted(recipe: Recipe) -> None:
    run = create_run(recipe)
    run_queue.enqueue(run)
    with pytest.raises(UserError, match="has not ended"):
        actions.move_to_trash(run)
    assert run.path.exists()


def test_a_run_to_train_now_is_the_next(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    before = [actions.submit(recipe).id for _ in range(2)]
    now = actions.submit(recipe, now=True)
    assert run_queue.waiting() == [now.id, *before]


def test_a_killed_apps_trash_can_be_restored(recipe: Recipe) -> None:
    run = ended(recipe)
    app = subprocess.run([sys.executable, "-c", DELETES, str(run.path)], check=False)
    assert app.returncode == -signal.SIGKILL and all_runs() == []
    actions.empty_trash(actions.KEPT_S)
    assert actions.restore_run(run.id) == run and all_runs() == [run]


def test_runs_are_erased_after_a_week(recipe: Recipe) -> None:
    young, old, unknown = ended(recipe), ended(recipe), ended(recipe)
    for run in (young, old, unknown):
        actions.move_to_trash(run)
    home = paths.runs_dir() / ".deleted"
    (home / old.id / "deleted").write_text(f"{time.time() - actions.KEPT_S - 1}")
    (home / unknown.id / "deleted").unlink()
    (home / "notes").mkdir()
    assert [each.run.id for each in actions.empty_trash(actions.KEPT_S)] == [old.id]
    assert {each.run.id for each in actions.trashed_runs()} == {young.id, unknown.id}
    assert [each.run.id for each in actions.empty_trash(1e-9)] == [young.id], (
        "of the other the time is not known"
    )
    assert actions.empty_trash() == [] and {path.name for path in home.iterdir()} == {"notes", unknown.id}


def test_a_run_that_is_a_link_is_not_deleted(recipe: Recipe, tmp_path: Path) -> None:
    run = ended(recipe)
    target = run.path.rename(tmp_path / "bigger-disk")
    run.path.symlink_to(target)
    for delete in (actions.move_to_trash, actions.delete):
        with pytest.raises(UserError, match="bigger-disk"):
            delete(run)
    assert run.recipe_path.exists()


def test_what_uses_a_run_is_named(recipe: Recipe) -> None:
    run = ended(recipe)
    assert actions.uses_of(run) == []
    waits = create_run(recipe.__class__(name="further", lora=Lora(init_from=str(run.adapter_dir))))
    run_queue.enqueue(waits)
    handle = hold_folder(run.path)
    assert handle is not None
    uses = actions.uses_of(run)
    assert len(uses) == 2 and uses[0].startswith(waits.name) and "chat" in uses[1]
    os.close(handle)
    run_queue.remove(waits)
    assert actions.uses_of(run) == []


@pytest.mark.parametrize("time", ["inf", "-inf", "nan", "yesterday"])
def test_a_time_that_is_none_is_that_of_the_folder(recipe: Recipe, time: str) -> None:
    run = create_run(recipe)
    actions.move_to_trash(run)
    (paths.runs_dir() / ".deleted" / run.id / "deleted").write_text(time)
    (trashed,) = actions.trashed_runs()
    assert 0 <= trashed.age_s < 60
