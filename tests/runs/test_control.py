from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from qlora_tui.errors import UserError
from qlora_tui.runs import control, run_queue
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import Status, write_status


@pytest.fixture
def running(run: RunDir) -> RunDir:
    write_status(run, Status(state="running", at=time.time(), process=process_identity()))
    return run


def test_requests_are_taken_once_in_the_order_they_were_made(running: RunDir) -> None:
    control.send_request(running, "checkpoint")
    control.send_request(running, "set_learning_rate", 1e-5)
    control.send_request(running, "stop")
    assert control.take_requests(running) == [
        control.ControlRequest(kind="checkpoint"),
        control.ControlRequest(kind="set_learning_rate", value=1e-5),
        control.ControlRequest(kind="stop"),
    ]
    assert control.take_requests(running) == []


def test_what_is_not_a_request_is_removed_and_said(
    running: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    (running.control_dir / "0.json").write_text("not json")
    (running.control_dir / "1.json").write_text('{"kind": "self_destruct"}')
    assert control.take_requests(running) == []
    assert list(running.control_dir.iterdir()) == []
    assert "0.json" in (said := capsys.readouterr().err) and "self_destruct" in said


def test_poisoned_control_files_neither_fail_nor_block(running: RunDir, tmp_path: Path) -> None:
    folder = running.control_dir
    (folder / "0.json").write_bytes(b'{"kind": "st\xffop"}')
    (folder / "1.json").write_bytes(b'{"kind": ' + b"[" * 100_000)
    (folder / "2.json").mkdir()
    (folder / "2.json" / "inside").touch()
    os.mkfifo(folder / "3.json")
    os.mkfifo(tmp_path / "pipe")
    (folder / "4.json").symlink_to(tmp_path / "pipe")
    (folder / "5.json").symlink_to("/dev/zero")
    (folder / "6.json").symlink_to("nowhere")
    (folder / "7.json").write_bytes(b"")
    (folder / "8.json").write_bytes(b'{"kind": "pause", "x": "' + b"y" * 10_000_000 + b'"}')
    control.send_request(running, "stop")
    assert control.take_requests(running) == [control.ControlRequest(kind="stop")]
    assert control.take_requests(running) == []
    assert [path.name for path in folder.iterdir()] == ["2.json"]


def test_a_request_that_cannot_be_removed_is_not_taken(
    running: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    control.send_request(running, "checkpoint")

    def read_only(path: Path, **how: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    assert control.take_requests(running) == []


def test_asking_a_run_nobody_trains_is_refused(run: RunDir) -> None:
    write_status(run, Status(state="finished", at=time.time()))
    with pytest.raises(UserError, match="not running") as caught:
        control.send_request(run, "pause")
    assert "finished" in caught.value.what


def test_a_request_to_a_killed_attempt_is_dropped(run: RunDir) -> None:
    write_status(run, Status(state="running", at=time.time(), process=process_identity()))
    control.send_request(run, "stop")
    (run.control_dir / "folder.json").mkdir()
    write_status(run, Status(state="failed", at=time.time()))
    run_queue.requeue(run)
    assert control.take_requests(run) == []
