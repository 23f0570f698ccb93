from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from msgspec.structs import replace

from qlora_tui.runs import actions, run_queue
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import AnyEvent, CheckpointSaved, Failed, Finished, Paused, Started
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import Status, read_status, write_heartbeat, write_status
from tests.support.polling import wait_for

STARTED = Started(at=1.0, attempt=1, pid=1)


def running(process_id: int | None = None) -> Status:
    return Status(
        state="running", at=time.time(), process=process_identity(process_id), phase="training", step=7
    )


def test_a_run_whose_process_lives_is_running(run: RunDir) -> None:
    write_status(run, running())
    assert read_status(run).state == "running"


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


def test_a_reused_pid_is_not_the_run(run: RunDir) -> None:
    ours = process_identity()
    stranger = type(ours)(pid=ours.pid, start_ticks=1, boot_id=ours.boot_id)
    write_status(run, Status(state="running", at=time.time(), process=stranger))
    assert read_status(run).state == "lost"


def test_a_restarted_machine_is_told_apart(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    write_status(run, running())
    monkeypatch.setenv("QLORA_TUI_BOOT_ID", "another-boot")
    status = read_status(run)
    assert status.state == "lost"
    assert "restarted" in status.detail


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
