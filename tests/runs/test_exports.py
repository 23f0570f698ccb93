"""Background exports: real processes of a tiny model, canceled and killed.

The records of background exports, without their processes.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from pathlib import Path

import msgspec
import pytest

from qlora_tui.errors import UserError
from qlora_tui.locks import locked
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.runs import exports
from qlora_tui.runs.check import check_run
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.exports import (
    Export,
    ExportRequest,
    ExportState,
    ExportStatus,
    cancel_export,
    exports_dir,
    is_exported,
    output_path,
    read_exports,
    restart_export,
    start_export,
    unreadable_exports,
    write_export_status,
)
from qlora_tui.runs.process import process_identity
from tests.chat.adapters import make_adapter
from tests.support.polling import wait_for
from tests.training.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    model = make_tiny_model(tmp_path / "model")
    row = '{"prompt": "What is red?", "completion": "a colour of the fox and the dog"}\n'
    (tmp_path / "rows.jsonl").write_text(row * 30)
    recipe = Recipe(
        name="tiny",
        model=Model(id=str(model)),
        data=Data(sources=(Source(path=str(tmp_path / "rows.jsonl")),)),
    )
    run = create_run(recipe)
    shutil.copytree(make_adapter(model, tmp_path / "adapter"), run.adapter_dir)
    return run


def newest(run: RunDir) -> Export:
    return read_exports(run)[0]


def wait_while_running(run: RunDir) -> Export:
    wait_for(lambda: newest(run).status.state != "running", seconds=120)
    return newest(run)


def wait_for_process(run: RunDir) -> Export:
    wait_for(lambda: newest(run).status.process, seconds=120)
    return newest(run)


def left_behind(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir()) if out.parent.exists() else []


@pytest.mark.usefixtures("quick_trainers")
def test_an_export_survives_kill_and_cancel_and_is_written(run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "out" / "tiny.gguf"
    request = ExportRequest(form="gguf", out=str(out), file_type="Q8_0")

    start_export(run, request)
    process = wait_for_process(run).status.process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    export = wait_while_running(run)
    assert export.status.state == "failed"
    assert "The process that exports was killed" in export.status.problem
    assert "out of memory" in export.status.problem
    assert (
        f"Close other programs. Try again. The last output of the process is in {export.folder / 'log'}"
        in export.status.problem
    )
    assert "tiny.gguf" not in left_behind(out)

    start_export(run, request)
    cancel_export(wait_for_process(run))
    assert wait_while_running(run).status.state == "canceled"
    assert left_behind(out) == []

    start_export(run, request)
    export = wait_while_running(run)
    assert export.status.state == "finished", export
    assert export.status.paths == (str(out),)
    assert export.status.bytes == out.stat().st_size
    assert "Q8_0: same top token in" in export.status.summary
    assert export.status.command == f"llama-server -m {out}"
    assert left_behind(out) == ["tiny.gguf"]


def test_an_export_that_fails_says_why(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_tui.export import export_job

    out = tmp_path / "tiny.gguf"
    out.write_text("mine")
    monkeypatch.setattr(exports, "start_detached", lambda *args, **how: None)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    export = start_export(run, ExportRequest(form="gguf", out=str(out), file_type="F16"))
    with pytest.raises(UserError, match="could not be canceled"):
        cancel_export(export)
    export_job.run_job(export.folder)
    assert newest(run).status.state == "failed"
    assert "already exists" in newest(run).status.problem
    assert out.read_text() == "mine"


def test_unreadable_exports_are_left_out(run: RunDir) -> None:
    folder = exports_dir(run) / "0001"
    folder.mkdir(parents=True)
    (folder / "request.json").write_bytes(msgspec.json.encode({"form": "else"}))
    assert read_exports(run) == [] and unreadable_exports(run) == [folder]
    assert not is_exported(run)
    with locked(folder / "lock"):
        assert is_exported(run), "its process still works"
    assert any("exports/0001" in defect.what for defect in check_run(run).defects)


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "start_detached", lambda *args, **how: None)


def start(run: RunDir, out: Path, state: ExportState = "running") -> exports.Export:
    export = start_export(run, ExportRequest(form="gguf", out=str(out), file_type="F16"))
    status = ExportStatus(state=state, at=time.time(), process=process_identity())
    write_export_status(export.folder, status)
    return export


@pytest.mark.usefixtures("no_process")
def test_an_export_that_ends_while_read_has_not_failed(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = start(run, tmp_path / "model.gguf")

    def end_first(path: Path) -> bool:
        write_export_status(export.folder, ExportStatus(state="finished", at=time.time()))
        return False

    monkeypatch.setattr(exports, "is_locked", end_first)
    assert [each.status.state for each in read_exports(run)] == ["finished"]


@pytest.mark.usefixtures("no_process")
def test_an_export_that_ended_with_the_machine_says_so(run: RunDir, tmp_path: Path) -> None:
    export = start(run, tmp_path / "model.gguf")
    earlier = msgspec.structs.replace(process_identity(), boot_id="another")
    write_export_status(export.folder, ExportStatus(state="running", at=time.time(), process=earlier))
    status = newest(run).status
    assert status.state == "failed" and "The machine was restarted during the export" in status.problem

    # An error that could not be recorded is no kill, which would mean that memory ran out.
    process = msgspec.structs.replace(process_identity(), pid=2**22)
    write_export_status(export.folder, ExportStatus(state="running", at=time.time(), process=process))
    (export.folder / "log").write_text(
        "Traceback (most recent call last):\nOSError: [Errno 28] No space left\n"
    )
    problem = newest(run).status.problem
    assert "No space left" in problem and "out of memory" not in problem


@pytest.mark.usefixtures("no_process")
def test_a_restarted_export_replaces_the_failed_one(run: RunDir, tmp_path: Path) -> None:
    failed = start(run, tmp_path / "model.gguf", "failed")
    again = restart_export(run, failed)
    assert again.request == failed.request and again.folder != failed.folder
    assert [each.folder for each in read_exports(run)] == [again.folder]


@pytest.mark.usefixtures("no_process")
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
