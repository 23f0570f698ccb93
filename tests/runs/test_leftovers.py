from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from qlora_tui import paths
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import leftovers
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import Status, write_status
from qlora_tui.training.clean_files import single_file_view
from tests.runs.test_damage import put_adapter, put_checkpoint

NO_PROCESS = 4194304
"""A number above the highest that Linux gives."""


def left(path: Path, *, age_s: float = 2 * leftovers.OLD_S) -> Path:
    """A file or, with a slash at the end of its name, a folder that a killed process left."""
    if path.suffix:
        path.touch()
    else:
        path.mkdir()
        (path / "part").touch()
    at = time.time() - age_s
    os.utime(path, (at, at))
    return path


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that kill processes leave views of models in the machine's temporary folder."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def test_old_drafts_and_temporary_files_are_swept(run: RunDir) -> None:
    runs = paths.runs_dir()
    old = [
        left(runs / f".new-{NO_PROCESS}-x"),
        left(runs / ".tickets-20260101-0101"),
        left(run.path / ".status.json.a8_x"),
        left(run.path / ".heartbeat.json.b"),
        left(run.adapter_draft),
        left(run.checkpoints_dir / ".writing-step-5"),
        left(run.checkpoints_dir / "step-4"),
    ]
    assert sorted(leftovers.sweep()) == sorted(old)
    assert not any(path.exists() for path in old)
    assert run.recipe_path.exists() and run.checkpoints_dir.exists()


def test_what_is_young_or_has_an_owner_stays(run: RunDir, recipe: Recipe) -> None:
    trained = create_run(recipe)
    write_status(trained, Status(state="running", at=1.0, process=process_identity()))
    put_checkpoint(run.checkpoints_dir / "step-3")
    put_adapter(run.adapter_dir)
    stay = [
        left(paths.runs_dir() / f".new-{os.getpid()}-x"),
        left(paths.runs_dir() / ".deleted"),
        left(run.path / ".status.json.young", age_s=60),
        left(run.adapter_draft, age_s=60),
        left(trained.adapter_draft),
        left(run.path / "mine.txt"),
    ]
    assert leftovers.sweep() == []
    assert all(path.exists() for path in stay)


def test_views_of_killed_processes_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "weights").touch()
    dead = left(tmp_path / f"{leftovers.VIEW}{NO_PROCESS}-x")
    (dead / "link").symlink_to(tmp_path / "weights")
    os.utime(dead, (1, 1))
    foreign = left(tmp_path / f"{leftovers.VIEW}{NO_PROCESS}-y")
    os.chown(foreign, 12345, 12345) if os.geteuid() == 0 else foreign.rmdir()
    (tmp_path / f"{leftovers.VIEW}{NO_PROCESS}-z").symlink_to(tmp_path)
    left(tmp_path / f"{leftovers.VIEW}{os.getpid()}-x")
    left(tmp_path / f"{leftovers.VIEW}{NO_PROCESS}-young", age_s=60)
    left(tmp_path / "qlora-tui-drill-x")
    with single_file_view(tmp_path / "weights") as view:
        os.utime(view, (1, 1))
        assert view.name.startswith(f"{leftovers.VIEW}{os.getpid()}-")
        assert leftovers.sweep() == [dead]
        assert view.exists() and (tmp_path / "weights").exists() and not dead.exists()


def test_a_trainer_sweeps_its_own_drafts_at_once(run: RunDir) -> None:
    draft = left(run.adapter_draft, age_s=1)
    stays = left(run.path / ".status.json.young", age_s=1)
    leftovers.sweep_own(run)
    assert not draft.exists() and stays.exists()


def test_folders_moved_aside_are_restored_where_no_replacement_exists(run: RunDir) -> None:
    put_adapter(run.path / ".adapter.earlier")
    put_checkpoint(run.checkpoints_dir / ".step-3.earlier")
    assert sorted(leftovers.restore(run)) == [run.adapter_dir, run.checkpoints_dir / "step-3"]
    assert run.adapter_dir.exists() and [step for step, _ in run.checkpoints()] == [3]


def test_an_earlier_folder_goes_where_the_new_one_stands(run: RunDir) -> None:
    put_adapter(run.adapter_dir)
    earlier = put_adapter(run.path / ".adapter.earlier")
    assert leftovers.restore(run) == []
    leftovers.sweep_own(run)
    assert run.adapter_dir.exists() and not earlier.exists()
