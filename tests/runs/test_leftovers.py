"""What killed processes left is deleted, and nothing that somebody else made."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import msgspec
import pytest

from qlora_tui import paths
from qlora_tui.files import private_dir
from qlora_tui.publishing import draft_path, earlier_path, held_draft, new_draft
from qlora_tui.runs import leftovers
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.exports import ExportRequest, delete_export, read_exports
from tests.runs.damage import put_adapter, put_checkpoint


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that kill processes leave views of models in the machine's temporary folder."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def _write_and_die(draft: Path) -> None:
    with held_draft(draft) as files:
        assert files is not None
        (files / "part").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def killed(draft: Path) -> Path:
    """A draft as a process leaves it that is killed while it writes."""
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(draft,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return draft


def foreign(folder: Path) -> Path:
    """A folder of the user's, untouched for years."""
    (folder / "files").mkdir(parents=True)
    (folder / "files/thesis.txt").write_text("mine")
    (folder / "lock").touch()
    (folder / "key").write_text("key")
    os.utime(folder, (1, 1))
    return folder


def test_what_killed_processes_left_is_swept(run: RunDir) -> None:
    file = run.path / ".qlora-tui-a8_xy7z1.tmp"
    file.touch()
    os.utime(file, (1, 1))
    dead = [
        killed(draft)
        for draft in (
            paths.runs_dir() / ".qlora-tui-1.part",
            draft_path(run.adapter_dir),
            draft_path(run.checkpoints_dir / "step-5"),
            draft_path(private_dir(paths.cache_dir() / "quantized") / "model-nf4-0123456789abcdef"),
            Path(tempfile.gettempdir()) / ".qlora-tui-2.part",
        )
    ]
    assert sorted(leftovers.sweep()) == sorted([*dead, file])
    assert not any(path.exists() for path in [*dead, file])
    assert run.recipe_path.exists() and run.checkpoints_dir.exists()


def test_nothing_without_our_marker_is_swept(run: RunDir) -> None:
    runs, temporary = paths.runs_dir(), Path(tempfile.gettempdir())
    folders = [
        *(
            foreign(runs / name)
            for name in (".git", ".stversions", ".new-9-x", ".deleting-9-x", ".notes.part")
        ),
        *(foreign(run.path / name) for name in (".adapter", ".adapter.part", ".adapter.earlier")),
        *(foreign(run.checkpoints_dir / name) for name in (".writing-step-5", "step-4", ".step-4.part")),
        *(
            foreign(private_dir(paths.cache_dir() / "quantized") / name)
            for name in (".writing", "mine", ".mine.part")
        ),
        foreign(private_dir(paths.cache_dir() / "uploads") / ".thesis.part"),
        foreign(temporary / "qlora-tui-view-9-x"),
        foreign(temporary / ".thesis.part"),
    ]
    stays = run.path / ".status.json.old"
    stays.touch()
    os.utime(stays, (1, 1))
    assert leftovers.sweep() == []
    leftovers.sweep_own(run)
    assert all((folder / "files/thesis.txt").exists() for folder in folders) and stays.exists()


def test_what_a_process_uses_stays(run: RunDir, tmp_path: Path) -> None:
    young = run.path / ".qlora-tui-a8_xy7z1.tmp"
    young.touch()
    with new_draft(paths.runs_dir()) as files, new_draft(Path(tempfile.gettempdir())) as view:
        assert leftovers.sweep() == []
        leftovers.sweep_own(run)
        assert files.exists() and view.exists() and young.exists()
    assert not files.parent.exists() and not view.parent.exists()


def test_no_file_of_a_run_decides_what_is_deleted_elsewhere(run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    theirs = foreign(draft_path(out))
    ours = killed(draft_path(tmp_path / "other"))
    for number, target in enumerate((out, tmp_path / "other"), 1):
        folder = private_dir(run.path / f"exports/{number:04d}")
        (folder / "request.json").write_bytes(
            msgspec.json.encode(ExportRequest(form="merge", out=str(target)))
        )
        (folder / "status.json").write_text('{"state": "failed", "at": 1.0}')
    leftovers.sweep()
    for export in read_exports(run):
        delete_export(export)
    assert (theirs / "files/thesis.txt").exists() and ours.exists()


def test_a_trainer_sweeps_its_own_drafts_at_once(run: RunDir) -> None:
    draft = killed(draft_path(run.adapter_dir))
    leftovers.sweep_own(run)
    assert not draft.exists()


def test_folders_moved_aside_are_restored_where_no_replacement_exists(run: RunDir) -> None:
    for final in (run.adapter_dir, run.checkpoints_dir / "step-3"):
        place = earlier_path(final)
        killed(place.parent)
        (put_adapter if final == run.adapter_dir else put_checkpoint)(place)
    assert sorted(leftovers.restore(run)) == [run.adapter_dir, run.checkpoints_dir / "step-3"]
    assert run.adapter_dir.exists() and [step for step, _ in run.checkpoints()] == [3]


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_sweep_deletes_no_last_copy(run: RunDir, *, is_replaced: bool) -> None:
    draft = killed(draft_path(run.adapter_dir))
    put_adapter(earlier_path(run.adapter_dir))
    if is_replaced:
        put_adapter(run.adapter_dir)
    leftovers.sweep()
    assert run.adapter_dir.exists() and not draft.exists()
