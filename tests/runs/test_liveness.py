"""A live run is never called lost: not when the clock is set, not by a second machine."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from msgspec import structs

from qlora_tui import locks
from qlora_tui.runs import liveness, process, runner
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.process import ProcessIdentity, process_identity
from qlora_tui.runs.status import Status, read_status, write_status
from qlora_tui.runs.status_summary import summarize_status
from qlora_tui.runs.view import RunView
from tests.support.polling import wait_for
from tests.support.step_events import a_step

HOUR = 3600.0


@pytest.fixture(autouse=True)
def forgotten_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_beats", {})


def says(run: RunDir, process: ProcessIdentity, *, age: float = 0.0) -> Status:
    """The status of a run in training whose last heartbeat is ``age`` seconds old, as it is read."""
    at = time.time() - age
    write_status(run, Status(state="running", at=at, process=process, step=7))
    os.utime(run.status_path, (at, at))
    return read_status(run)


def elsewhere(**changes: str) -> ProcessIdentity:
    return structs.replace(
        process_identity(), boot_id="boot of b", machine="machine b", host="b.example", **changes
    )


@pytest.mark.parametrize("by", [-HOUR, -2.0, 2.0, HOUR])
def test_a_clock_step_does_not_lose_a_live_run(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, by: float
) -> None:
    before = process_identity()
    boots = process._boot_time()
    # The kernel's boot time is the clock less the uptime, so it moves with the clock.
    monkeypatch.setattr(process, "_boot_time", lambda: boots + by)
    assert process_identity().started == pytest.approx(before.started + by, abs=0.1)
    assert says(run, before).state == "running"


def test_one_tick_tells_two_processes_of_one_number_apart(run: RunDir) -> None:
    ours = process_identity()
    assert says(run, structs.replace(ours, start_ticks=ours.start_ticks + 1)).state == "lost"


@pytest.mark.parametrize("pid", [-1, 0, 2**22 + 1, 2**31, 2**63, 10**30])
def test_a_number_that_no_process_has_is_lost(run: RunDir, pid: int) -> None:
    gone = structs.replace(process_identity(), pid=pid)
    assert says(run, gone).state == "lost"
    gone.wait(0.0)


def test_a_status_of_an_older_version_is_read(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    now = process_identity()
    old = ProcessIdentity(pid=now.pid, started=now.started, boot_id=now.boot_id)
    assert says(run, old).state == "running"
    assert says(run, structs.replace(old, started=old.started - HOUR)).state == "lost"
    # After a clock step only the lock shows that its trainer lives.
    with locks.locked(run.trainer_lock_path):
        assert says(run, structs.replace(old, started=old.started - HOUR)).state == "running"


def test_a_run_of_another_machine_is_running_there(run: RunDir) -> None:
    status = says(run, elsewhere())
    assert status.state == "running"
    assert status.detail == "Running on another machine (b.example)."


@pytest.mark.parametrize("clock", [-HOUR, HOUR])
def test_a_heartbeat_that_moves_is_alive_whatever_the_clocks(run: RunDir, clock: float) -> None:
    assert says(run, elsewhere(), age=clock).state == "lost"
    assert says(run, elsewhere(), age=clock - 1).state == "running"


def test_a_silent_run_of_another_machine_says_since_when(run: RunDir) -> None:
    status = says(run, elsewhere(), age=2 * HOUR)
    assert status.state == "lost"
    assert "b.example" in status.detail and "2 h" in status.detail


@pytest.mark.parametrize("age", [0.0, HOUR])
def test_the_runner_leaves_the_run_of_another_machine_alone(run: RunDir, age: float) -> None:
    says(run, elsewhere(), age=age)
    run.unreported_path.touch()
    before = run.status_path.read_bytes(), run.events_path.read_bytes()
    assert runner.main() == 0
    assert (run.status_path.read_bytes(), run.events_path.read_bytes()) == before


def test_another_container_of_one_kernel_is_judged_by_the_lock(run: RunDir) -> None:
    there = structs.replace(process_identity(), pid=1, pid_namespace="pid:[1]", machine="c", host="c")
    with locks.locked(run.trainer_lock_path):
        status = says(run, there, age=HOUR)
        assert (status.state, status.detail) == ("running", "Running in another container (c).")
    assert says(run, there).state == "lost"


def test_without_locks_another_container_is_judged_by_its_heartbeat(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "is_locked", lambda path: None)
    there = structs.replace(process_identity(), pid_namespace="pid:[1]")
    assert says(run, there).state == "running"
    liveness._beats.clear()
    assert says(run, there, age=HOUR).state == "lost"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])
    yield process
    process.kill()
    process.wait()


def test_a_suspended_trainer_is_said_to_be_suspended(run: RunDir, child: subprocess.Popen[bytes]) -> None:
    there = process_identity(child.pid)
    child.send_signal(signal.SIGSTOP)
    wait_for(lambda: there.state == "T")
    status = says(run, there, age=5.0)
    assert status.state == "running"
    assert "Suspended" in status.detail and f"kill -CONT {child.pid}" in status.detail
    view = RunView(run)
    view.status = structs.replace(status, total_steps=100)
    view.series.append(a_step(1))
    view.series.append(a_step(2))
    said = summarize_status(view, None)
    assert "Suspended" in said and " left" not in said
    view.status = structs.replace(view.status, detail="")
    assert " left" in summarize_status(view, None)


def test_an_old_heartbeat_of_a_live_trainer_is_told(run: RunDir) -> None:
    assert says(run, process_identity(), age=1.0).detail == ""
    liveness._beats.clear()
    silent = says(run, process_identity(), age=125.0)
    assert silent.state == "running"
    assert "Not responding: no heartbeat for 2 min" in silent.detail


def test_waiting_for_a_process_ends_with_it(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    poll, polls = select.poll, threading.Event()

    def record_poll() -> select.poll:
        polls.set()
        return poll()

    monkeypatch.setattr(select, "poll", record_poll)
    there = process_identity(child.pid)
    waiting = threading.Thread(target=there.wait, args=(3600.0,), daemon=True)
    waiting.start()
    assert polls.wait(60.0)
    child.kill()
    wait_for(lambda: not waiting.is_alive())
