"""How an attempt ended is read from its own events, whatever was appended after them."""

from __future__ import annotations

import signal

import pytest

from qlora_tui.errors import EXIT_DISK
from qlora_tui.runs import run_queue
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventTail, EventWriter
from qlora_tui.runs.events import AnyEvent, Failed, Paused, Queued, Started, Stopped
from qlora_tui.runs.outcomes import determine_outcome, record_outcome
from qlora_tui.runs.status import Status, read_status, write_status

PAUSED = Paused(at=2.0, step=5)


def append(run: RunDir, *events: AnyEvent) -> None:
    with EventWriter(run.events_path) as log:
        for event in events:
            log.append(event)


def started(attempt: int) -> Started:
    return Started(at=1.0, attempt=attempt, pid=1)


def test_an_ending_counts_though_the_run_is_queued_again(run: RunDir) -> None:
    size = run.events_path.stat().st_size
    append(run, started(1), PAUSED, Queued(at=3.0))
    assert determine_outcome(run, 0, events_from=size) == PAUSED


def test_withdrawing_a_resumed_run_does_not_change_how_it_ended(run: RunDir) -> None:
    size = run.events_path.stat().st_size
    append(run, started(1), PAUSED, Queued(at=3.0), Stopped(at=4.0, step=5))
    assert determine_outcome(run, 0, events_from=size) == PAUSED


@pytest.mark.parametrize("is_child", [True, False])
def test_the_attempt_before_does_not_end_one_that_never_started(run: RunDir, is_child: bool) -> None:
    append(run, started(1), PAUSED, Queued(at=3.0))
    size = run.events_path.stat().st_size
    ending = determine_outcome(run, 1, events_from=size) if is_child else determine_outcome(run, None)
    assert isinstance(ending, Failed)


def test_a_run_queued_again_is_not_settled(run: RunDir) -> None:
    append(run, started(1), PAUSED, Queued(at=3.0))
    run_queue.enqueue(run)
    before = run.events_path.read_bytes()
    record_outcome(run, PAUSED)
    assert read_status(run).state == "queued"
    assert run.events_path.read_bytes() == before


def test_a_settled_status_is_not_written_a_second_time(run: RunDir) -> None:
    size = run.events_path.stat().st_size
    write_status(run, Status(state="paused", at=2.0, detail="By the trainer."))
    append(run, started(1), PAUSED, Queued(at=3.0))
    record_outcome(run, PAUSED, events_from=size)
    assert read_status(run).detail == "By the trainer."
    assert len([e for e in EventTail(run.events_path).drain() if isinstance(e, Paused)]) == 1


def test_a_signal_without_a_name_is_given_by_number(run: RunDir) -> None:
    ending = determine_outcome(run, -(signal.SIGRTMIN + 2))
    assert isinstance(ending, Failed)
    assert ending.kind == "killed"
    assert f"signal {signal.SIGRTMIN + 2}" in ending.what


def test_a_trainer_that_the_disk_failed_is_no_bug(run: RunDir) -> None:
    """The last event could not be written: the runner reads the exit code."""
    run.log_path.write_text("OSError: [Errno 5] Input/output error: '.adapter'\n")
    ending = determine_outcome(run, EXIT_DISK)
    assert isinstance(ending, Failed)
    assert (ending.title, ending.kind) == ("The disk failed", "problem")
    assert "Input/output error" in ending.what and "resume" in ending.fix
