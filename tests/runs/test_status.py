"""Whether the process of an active run is still working, and the one machine that a state folder is for."""

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
from msgspec.structs import replace

from qlora_tui import locks
from qlora_tui.errors import UserError
from qlora_tui.runs import actions, run_queue, runner
from qlora_tui.runs.describe import summarize_status
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import AnyEvent, CheckpointSaved, Failed, Finished, Paused, Started
from qlora_tui.runs.process import ProcessIdentity, process_identity
from qlora_tui.runs.status import Status, read_status, refuse_other_machines, write_heartbeat, write_status
from qlora_tui.runs.view import RunView
from tests.support.polling import wait_for
from tests.support.step_events import a_step

STARTED = Started(at=1.0, attempt=1, pid=1)


def running(process_id: int | None = None) -> Status:
    return Status(
        state="running", at=time.time(), process=process_identity(process_id), phase="training", step=7
    )


def test_a_run_whose_process_was_killed_is_lost(run: RunDir) -> None:
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


@pytest.mark.parametrize("content", [None, b"", b'{"state": "run', b"\xff", b"[" * 10_000])
@pytest.mark.parametrize(
    ("events", "state"),
    [
        ((), "stopped"),
        ((STARTED,), "lost"),
        ((STARTED, CheckpointSaved(at=2.0, step=5, folder="checkpoints/step-5")), "lost"),
        ((STARTED, Paused(at=3.0, step=5)), "paused"),
        ((STARTED, Failed(at=3.0, title="Out of memory", what="No more.")), "failed"),
        ((STARTED, Finished(at=3.0, step=9, seconds=1.0, tokens_per_s=1.0)), "finished"),
    ],
)
def test_without_a_readable_status_the_events_give_the_state(
    run: RunDir, content: bytes | None, events: tuple[AnyEvent, ...], state: str
) -> None:
    if content is not None:
        run.status_path.write_bytes(content)
    with EventWriter(run.events_path) as log:
        for event in events:
            log.append(event)
    assert read_status(run).state == state


def test_without_recipe_and_status_a_run_is_unreadable(run: RunDir) -> None:
    run.recipe_path.unlink()
    status = read_status(run)
    assert status.state == "unreadable" and "status.json is missing" in status.detail


@pytest.mark.parametrize("content", [b"", b"{", None])
def test_a_lost_heartbeat_costs_only_the_last_steps(run: RunDir, content: bytes | None) -> None:
    write_status(run, running())
    write_heartbeat(run, replace(running(), step=9))
    assert read_status(run).step == 9
    run.heartbeat_path.unlink()
    if content is not None:
        run.heartbeat_path.write_bytes(content)
    status = read_status(run)
    assert (status.state, status.step) == ("running", 7)


def test_a_heartbeat_of_an_earlier_trainer_says_nothing(run: RunDir) -> None:
    write_heartbeat(run, replace(running(), step=9, process=replace(process_identity(), pid=1)))
    write_status(run, running())
    assert read_status(run).step == 7


def test_without_a_status_the_heartbeat_shows_a_living_trainer(run: RunDir) -> None:
    write_heartbeat(run, running())
    assert read_status(run).state == "running"


def test_a_queued_run_without_queue_entry_is_stopped_and_resumable(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    write_status(run, Status(state="queued", at=1.0, step=7))
    status = read_status(run)
    assert (status.state, status.step) == ("stopped", 7)
    assert "not in the queue" in status.detail
    actions.resume(run)
    assert read_status(run).state == "queued" and run_queue.waiting() == [run.id]


HOUR = 3600.0


def says(run: RunDir, process: ProcessIdentity, *, age: float = 0.0) -> Status:
    """The status of a run in training whose last heartbeat is ``age`` seconds old, as it is read."""
    at = time.time() - age
    write_status(run, Status(state="running", at=at, process=process, step=7))
    os.utime(run.status_path, (at, at))
    return read_status(run)


def elsewhere() -> ProcessIdentity:
    return structs.replace(process_identity(), boot_id="boot of b", host="b.example")


def test_one_tick_tells_two_processes_of_one_number_apart(run: RunDir) -> None:
    ours = process_identity()
    assert says(run, structs.replace(ours, start_ticks=ours.start_ticks + 1)).state == "lost"


@pytest.mark.parametrize("pid", [-1, 0, 2**22 + 1, 2**31, 2**63, 10**30])
def test_a_number_that_no_process_has_is_lost(run: RunDir, pid: int) -> None:
    gone = structs.replace(process_identity(), pid=pid)
    assert says(run, gone).state == "lost"
    gone.wait(0.0)


def test_a_run_of_another_machine_is_running_there(run: RunDir) -> None:
    status = says(run, elsewhere())
    assert status.state == "running"
    assert status.detail == "Running on another machine (b.example)."


def test_a_silent_run_of_another_machine_says_since_when(run: RunDir) -> None:
    status = says(run, elsewhere(), age=2 * HOUR)
    assert status.state == "lost"
    assert "b.example" in status.detail and "2 h" in status.detail


def test_a_second_machine_is_refused(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    says(run, elsewhere())
    with pytest.raises(UserError, match="Another machine") as caught:
        actions.resume(create_run(run.recipe()))
    assert "b.example" in caught.value.what
    assert runner.main() == 1
    assert "b.example" in capsys.readouterr().err
    says(run, elsewhere(), age=HOUR)
    refuse_other_machines()


def test_a_restarted_machine_loses_a_run(run: RunDir) -> None:
    status = says(run, structs.replace(process_identity(), boot_id="the boot before"))
    assert (status.state, status.detail) == ("lost", "The machine was restarted during the run.")


def test_another_container_of_one_kernel_is_judged_by_the_lock(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = structs.replace(process_identity(), pid=1, host="c")
    with locks.locked(run.trainer_lock_path):
        status = says(run, there, age=HOUR)
        assert (status.state, status.detail) == ("running", "Running in another container (c).")
    assert says(run, there).state == "lost"
    monkeypatch.setattr("qlora_tui.runs.status.is_locked", lambda path: None)
    assert says(run, there).state == "running"
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
    silent = says(run, process_identity(), age=125.0)
    assert silent.state == "running"
    assert "Not responding: no heartbeat for 2 min" in silent.detail
    assert "since the clock was set back" in says(run, process_identity(), age=-HOUR).detail


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
