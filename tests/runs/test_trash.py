"""Deleting and bringing back, across apps that live and that were killed."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import run_queue
from qlora_tui.runs.directory import RunDir, all_runs, create_run
from qlora_tui.runs.status import Status, write_status
from qlora_tui.runs.trash import Trash, empty_abandoned

DELETES = """
import sys
from pathlib import Path
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.trash import Trash
trash = Trash()
trash.put(RunDir(Path(sys.argv[1])))
print("deleted", flush=True)
sys.stdin.read()
"""


def ended(recipe: Recipe) -> RunDir:
    run = create_run(recipe)
    write_status(run, Status(state="stopped", at=1.0))
    return run


def test_what_was_deleted_last_comes_back_first(recipe: Recipe) -> None:
    first, second = ended(recipe), ended(recipe)
    trash = Trash()
    trash.put(first)
    trash.put(second)
    assert all_runs() == []
    assert trash.restore() == second
    assert trash.restore() == first
    assert trash.restore() is None
    assert set(all_runs()) == {first, second}


def test_a_deleted_runs_id_is_not_reused(recipe: Recipe) -> None:
    run = ended(recipe)
    trash = Trash()
    trash.put(run)
    assert create_run(recipe).id != run.id
    assert trash.restore() == run


def test_a_waiting_run_is_not_deleted(recipe: Recipe) -> None:
    run = create_run(recipe)
    run_queue.enqueue(run)
    with pytest.raises(UserError, match="has not ended"):
        Trash().put(run)
    assert run.path.exists()


def test_a_killed_apps_trash_is_emptied_at_the_next_start(
    recipe: Recipe,
) -> None:
    run = ended(recipe)
    app = subprocess.Popen(
        [sys.executable, "-c", DELETES, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert app.stdout is not None and app.stdin is not None
    with app.stdout, app.stdin:
        assert app.stdout.readline() == b"deleted\n"
        home = paths.runs_dir() / ".deleted"
        empty_abandoned()
        assert len(list(home.glob(f"*/{run.id}"))) == 1
        app.send_signal(signal.SIGKILL)
        app.wait()
    empty_abandoned()
    assert list(home.iterdir()) == []
