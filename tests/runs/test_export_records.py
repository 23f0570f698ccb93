"""The records of background exports, without their processes."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import exports
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.exports import (
    ExportRequest,
    ExportState,
    ExportStatus,
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
