from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from msgspec import structs

from qlora_tui import paths
from qlora_tui.files import private_dir
from qlora_tui.locks import locked
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import run_queue, runner
from qlora_tui.runs.devices import Devices
from qlora_tui.runs.directory import RunDir, create_run, queue_path
from qlora_tui.runs.event_log import last_event
from qlora_tui.runs.events import Stopped
from qlora_tui.runs.gate import Gate
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import Status, is_stranded, read_status, write_status
from tests.support.polling import while_it_sleeps
from tests.support.power import FaultyDisk


def test_runs_leave_in_the_order_they_came(recipe: Recipe) -> None:
    runs = [create_run(recipe) for _ in range(3)]
    for run in runs:
        run_queue.enqueue(run)
    assert run_queue.waiting() == [run.id for run in runs]


def test_a_run_can_be_moved_within_the_queue_only(recipe: Recipe) -> None:
    a, b, c = (create_run(recipe) for _ in range(3))
    for run in (a, b, c):
        run_queue.enqueue(run)
    run_queue.move(c, -1)
    assert run_queue.waiting() == [a.id, c.id, b.id]
    run_queue.move(c, -5)
    assert run_queue.waiting() == [c.id, a.id, b.id]
    run_queue.move(c, 1)
    assert run_queue.waiting() == [a.id, c.id, b.id]
    run_queue.move(a, 9)
    assert run_queue.waiting() == [c.id, b.id, a.id]


def test_a_withdrawn_run_is_stopped_before_it_began(recipe: Recipe) -> None:
    run = create_run(recipe)
    run_queue.enqueue(run)
    assert run_queue.cancel(run)
    assert not run_queue.cancel(run)
    assert run_queue.waiting() == []
    assert read_status(run).state == "stopped"
    assert isinstance(last_event(run.events_path), Stopped)


def test_a_requeued_run_keeps_its_progress(recipe: Recipe) -> None:
    run = create_run(recipe)
    write_status(run, Status(state="paused", at=1.0, step=7, total_steps=20, loss=1.5, detail="Paused."))
    run.unreported_path.touch()
    run_queue.requeue(run)
    assert not run.unreported_path.exists(), "who queues it again knows how it ended"
    assert read_status(run) == Status(
        state="queued", at=read_status(run).at, step=7, total_steps=20, loss=1.5
    )
    run_queue.cancel(run)
    status = read_status(run)
    assert (status.state, status.step, status.total_steps, status.loss) == ("stopped", 7, 20, 1.5)
    ending = last_event(run.events_path)
    assert isinstance(ending, Stopped) and ending.step == 7


def test_the_queue_of_an_earlier_version_is_continued(recipe: Recipe) -> None:
    first, second, third = (create_run(recipe) for _ in range(3))
    for order, run in ((7, first), (5, second)):
        (private_dir(paths.state_dir() / "queue") / f"{order:020d}.{run.id}").touch()
    assert run_queue.waiting() == [second.id, first.id]
    run_queue.enqueue(third)
    assert run_queue.remove(second) and run_queue.waiting() == [first.id, third.id]


def test_a_run_whose_id_is_not_utf8_is_queued(recipe: Recipe) -> None:
    run = create_run(recipe)
    odd = RunDir(run.path.rename(run.path.with_name(os.fsdecode(b"owls\xff"))))
    run_queue.enqueue(odd)
    assert run_queue.waiting() == [odd.id] and run_queue.cancel(odd)


def test_a_damaged_queue_is_empty(recipe: Recipe) -> None:
    queue_path().write_text("[")
    run = create_run(recipe)
    assert run_queue.waiting() == []
    run_queue.enqueue(run)
    assert run_queue.waiting() == [run.id]


def test_an_entry_whose_status_was_not_written_is_queued_again(recipe: Recipe) -> None:
    run = create_run(recipe)
    run_queue.enqueue(run)
    write_status(run, Status(state="paused", at=1.0, step=7))
    run_queue.requeue(run)
    assert run_queue.waiting() == [run.id]
    assert (read_status(run).state, read_status(run).step) == ("queued", 7)


def has_stopped(run: RunDir) -> bool:
    return read_status(run).state == "stopped"


@pytest.mark.parametrize("is_wrong", [has_stopped, is_stranded])
def test_a_run_that_is_taken_while_it_is_read_has_not_stopped(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, is_wrong: Callable[[RunDir], bool]
) -> None:
    def take_first() -> list[str]:
        monkeypatch.setattr("qlora_tui.runs.status.waiting", run_queue.waiting)
        run_queue.take(run, process_identity())
        return run_queue.waiting()

    run_queue.enqueue(run)
    write_status(run, Status(state="queued", at=1.0))
    monkeypatch.setattr("qlora_tui.runs.status.waiting", take_first)
    assert not is_wrong(run)


def test_a_run_in_training_is_not_queued_again(run: RunDir) -> None:
    write_status(run, Status(state="starting", at=1.0, process=process_identity()))
    run.unreported_path.touch()
    run_queue.requeue(run)
    assert run_queue.waiting() == [] and read_status(run).state == "starting"
    assert run.unreported_path.exists(), "its end is still to be reported"


def test_reading_an_empty_queue_creates_nothing() -> None:
    assert run_queue.waiting() == [] and not queue_path().exists()


class FullLog(io.StringIO):
    """A stream on a full disk."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = ""

    def write(self, text: str) -> int:
        self.refused += text
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_does_not_end_the_queue(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [create_run(recipe) for _ in range(3)]
    for run in runs:
        run_queue.enqueue(run)
    runs[0].recipe_path.unlink()
    log = FullLog()
    monkeypatch.setattr(sys, "stderr", log)
    with monkeypatch.context() as full:
        FaultyDisk(full, 1, errno.ENOSPC, lasting=True)
        assert runner.main() == 0, log.refused
    assert [run.id for run in runs if run.id in log.refused] == [run.id for run in runs], "each was tried"
    assert run_queue.waiting() == [run.id for run in runs]


def test_a_trainer_without_a_status_is_waited_for(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_runner = structs.replace(process_identity(), start_ticks=1)
    write_status(run, Status(state="starting", at=1.0, process=killed_runner))
    with ExitStack() as trainer:
        trainer.enter_context(locked(run.trainer_lock_path))

        def end() -> None:
            write_status(run, Status(state="finished", at=2.0))
            trainer.close()

        while_it_sleeps(monkeypatch, end)
        runner._take_over(run, Devices(()), Gate())
    assert read_status(run).state == "finished"
