"""The records of background exports, without their processes."""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from qlora_tui import paths
from qlora_tui.drafts import draft_path, held_draft, owned_by
from qlora_tui.errors import UserError
from qlora_tui.files import private_dir
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions, exports, leftovers
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.exports import (
    ExportRequest,
    ExportState,
    ExportStatus,
    can_resume,
    delete_export,
    leave_gpu_to_runs,
    output_path,
    read_exports,
    restart_export,
    start_export,
    write_export_status,
)
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import Status, write_status
from tests.support.nvml_stub import install_nvml_stub


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "start_detached", lambda *args, **how: None)


def start(run: RunDir, out: Path, state: ExportState = "running") -> exports.Export:
    export = start_export(run, ExportRequest(form="gguf", out=str(out), file_type="F16"))
    status = ExportStatus(state=state, at=time.time(), process=process_identity())
    write_export_status(export.folder, status)
    return export


def test_an_export_that_ends_while_read_has_not_failed(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = start(run, tmp_path / "model.gguf")

    def end_first(path: Path) -> bool:
        write_export_status(export.folder, ExportStatus(state="finished", at=time.time()))
        return False

    monkeypatch.setattr(exports, "is_locked", end_first)
    assert [each.status.state for each in read_exports(run)] == ["finished"]


def test_an_export_without_a_process_has_failed(run: RunDir, tmp_path: Path) -> None:
    start(run, tmp_path / "model.gguf")
    assert [each.status.state for each in read_exports(run)] == ["failed"]


def test_a_restarted_export_replaces_the_failed_one(run: RunDir, tmp_path: Path) -> None:
    failed = start(run, tmp_path / "model.gguf", "failed")
    again = restart_export(run, failed)
    assert again.request == failed.request and again.folder != failed.folder
    assert [each.folder for each in read_exports(run)] == [again.folder]


def test_an_export_that_cannot_be_recorded_is_explained(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exports, "atomic_write", full)
    with pytest.raises(UserError, match="No space left"):
        start(run, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("form", "out", "written"),
    [("merge", "/there/m", "/there/m"), ("ollama", "ns/m:8b", "/home/models/ns-m-8b-ollama")],
)
def test_the_path_of_an_export_follows_from_its_request(
    form: exports.Form, out: str, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home")
    assert output_path(ExportRequest(form=form, out=out)) == Path(written)
    assert output_path(ExportRequest(form="hub-gguf", out=out)) is None


def test_drafts_of_killed_exports_are_swept(run: RunDir, tmp_path: Path) -> None:
    dead, alive = tmp_path / "dead.gguf", tmp_path / "alive.gguf"
    for out in (dead, alive):
        start(run, out)
    upload = draft_path(private_dir(paths.cache_dir() / "uploads") / "key")
    for draft in (draft_path(dead), upload):
        with suppress(KeyboardInterrupt), held_draft(draft, "key"):
            raise KeyboardInterrupt
        os.utime(draft / "key", (0, 0))
    with held_draft(draft_path(alive)):
        # The temporary folder of this machine may have others.
        assert {upload, draft_path(dead)} <= set(leftovers.sweep())
        assert draft_path(alive).exists() and not draft_path(dead).exists() and not upload.exists()


def unfinished(run: RunDir, out: Path, age_s: float = 0.0) -> Path:
    """The draft of a canceled export of a run, started so long ago."""
    export = start(run, out, "canceled")
    draft = draft_path(out)
    with pytest.raises(KeyboardInterrupt), owned_by(export.folder), held_draft(draft, "key"):
        raise KeyboardInterrupt
    os.utime(draft / "key", (0, time.time() - age_s))
    return draft


def test_drafts_to_continue_are_swept_after_a_week(run: RunDir, tmp_path: Path) -> None:
    young, old = (
        unfinished(run, tmp_path / "young", 6 * 86_400),
        unfinished(run, tmp_path / "old", 8 * 86_400),
    )
    stray = draft_path(tmp_path / "stray")
    with pytest.raises(KeyboardInterrupt), held_draft(stray, "key"):
        raise KeyboardInterrupt
    os.utime(stray / "key", (0, 0))
    assert {old, stray} <= set(leftovers.sweep())
    assert young.exists() and not old.exists() and not stray.exists()
    assert [can_resume(export) for export in read_exports(run)] == [False, True]


def test_deleting_an_export_deletes_what_it_left(run: RunDir, tmp_path: Path) -> None:
    drafts = [unfinished(run, tmp_path / name) for name in ("one", "two", "three")]
    delete_export(read_exports(run)[0])
    assert [draft.exists() for draft in drafts] == [True, True, False] and len(read_exports(run)) == 2
    actions.move_to_trash(run)
    assert drafts[0].exists()
    actions.restore_run(run.id)
    actions.delete(run)
    assert not any(draft.exists() for draft in drafts)


def test_emptying_the_trash_deletes_unfinished_exports(run: RunDir, tmp_path: Path) -> None:
    draft = unfinished(run, tmp_path / "one")
    actions.move_to_trash(run)
    actions.empty_trash()
    assert not draft.exists()


def test_exports_leave_the_gpu_to_runs(run: RunDir, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert leave_gpu_to_runs() == "" and os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    trained = create_run(recipe)
    write_status(trained, Status(state="running", at=time.time(), process=process_identity()))
    assert f"{trained.id} is training on the GPU" in leave_gpu_to_runs()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_without_a_gpu_exports_say_nothing_about_it(run: RunDir) -> None:
    write_status(run, Status(state="running", at=time.time(), process=process_identity()))
    assert leave_gpu_to_runs() == ""
