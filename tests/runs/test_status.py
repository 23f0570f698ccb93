from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.process import mark
from qlora_tui.runs.status import Status, read_status, write_status
from tests.waiting import wait_for


def running(process_id: int | None = None) -> Status:
    return Status(state="running", at=time.time(), process=mark(process_id), phase="training", step=7)


def test_a_run_whose_process_lives_is_running(run: RunDir) -> None:
    write_status(run, running())
    assert read_status(run).state == "running"


def test_a_run_whose_process_was_killed_is_lost_and_says_so(run: RunDir) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    write_status(run, running(child.pid))
    assert read_status(run).state == "running"
    child.send_signal(signal.SIGKILL)
    # Not yet waited for: a zombie is not alive either.
    wait_for(lambda: read_status(run).state == "lost", saying="the run to be lost")
    child.wait()
    status = read_status(run)
    assert status.state == "lost"
    assert status.step == 7
    assert "killed" in status.detail


def test_a_number_used_again_by_another_process_is_not_the_run(run: RunDir) -> None:
    ours = mark()
    stranger = type(ours)(pid=ours.pid, started=ours.started - 1000, boot_id=ours.boot_id)
    write_status(run, Status(state="running", at=time.time(), process=stranger))
    assert read_status(run).state == "lost"


def test_a_restarted_machine_is_told_apart(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    write_status(run, running())
    monkeypatch.setenv("QLORA_TUI_BOOT_ID", "another-boot")
    status = read_status(run)
    assert status.state == "lost"
    assert "restarted" in status.detail


def test_a_missing_or_damaged_status_is_unreadable_not_a_crash(run: RunDir) -> None:
    assert read_status(run).state == "unreadable"
    run.status_path.write_bytes(b'{"state": "run')
    status = read_status(run)
    assert status.state == "unreadable"
    assert "status.json" in status.detail
