from __future__ import annotations

import time

from qlora_tui import paths
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import queue
from qlora_tui.runs.directory import create
from qlora_tui.runs.entries import queue_dir, stray_names
from qlora_tui.runs.events import Stopped
from qlora_tui.runs.log import last_event
from qlora_tui.runs.process import mark
from qlora_tui.runs.status import Status, read_status, write_status


def test_runs_leave_in_the_order_they_came(recipe: Recipe) -> None:
    runs = [create(recipe) for _ in range(3)]
    for run in runs:
        queue.enqueue(run)
    assert queue.waiting() == [run.id for run in runs]


def test_a_run_is_queued_once(recipe: Recipe) -> None:
    run = create(recipe)
    queue.enqueue(run)
    queue.enqueue(run)
    assert queue.waiting() == [run.id]


def test_a_run_can_be_moved_up_and_down_and_not_out(recipe: Recipe) -> None:
    a, b, c = (create(recipe) for _ in range(3))
    for run in (a, b, c):
        queue.enqueue(run)
    queue.move(c, -1)
    assert queue.waiting() == [a.id, c.id, b.id]
    queue.move(c, -5)
    assert queue.waiting() == [c.id, a.id, b.id]
    queue.move(c, 1)
    assert queue.waiting() == [a.id, c.id, b.id]
    queue.move(a, 9)
    assert queue.waiting() == [c.id, b.id, a.id]


def test_a_run_is_last_also_where_the_clock_was_set_back(recipe: Recipe) -> None:
    first, second, third = (create(recipe) for _ in range(3))
    queue.enqueue(first)
    (entry,) = (paths.state_dir() / "queue").iterdir()
    tomorrow = time.time_ns() + 86_400 * 10**9
    entry.rename(entry.with_name(f"{tomorrow:020d}.{first.id}"))
    queue.enqueue(second)
    queue.enqueue(third)
    assert queue.waiting() == [first.id, second.id, third.id]
    queue.move(first, 9)
    assert queue.waiting() == [second.id, third.id, first.id]


def test_a_run_whose_name_begins_like_another_keeps_its_place(recipe: Recipe) -> None:
    first, second = create(recipe), create(recipe)
    assert second.id.startswith(first.id)
    queue.enqueue(second)
    assert not queue.remove(first)
    assert queue.waiting() == [second.id]


def test_a_withdrawn_run_is_stopped_before_it_began(recipe: Recipe) -> None:
    run = create(recipe)
    queue.enqueue(run)
    assert queue.withdraw(run)
    assert not queue.withdraw(run)
    assert queue.waiting() == []
    assert read_status(run).state == "stopped"
    assert isinstance(last_event(run.events_path), Stopped)


def test_a_run_that_is_queued_again_keeps_how_far_it_had_come(recipe: Recipe) -> None:
    run = create(recipe)
    write_status(run, Status(state="paused", at=1.0, step=7, total_steps=20, loss=1.5, detail="Paused."))
    run.untold_path.touch()
    queue.enqueue_again(run)
    assert not run.untold_path.exists(), "who queues it again knows how it ended"
    assert read_status(run) == Status(
        state="queued", at=read_status(run).at, step=7, total_steps=20, loss=1.5
    )
    queue.withdraw(run)
    status = read_status(run)
    assert (status.state, status.step, status.total_steps, status.loss) == ("stopped", 7, 20, 1.5)
    ending = last_event(run.events_path)
    assert isinstance(ending, Stopped) and ending.step == 7


def test_two_runs_can_be_moved_past_each_other_without_end(recipe: Recipe) -> None:
    runs = [create(recipe) for _ in range(4)]
    for run in runs:
        queue.enqueue(run)
    a, b, c, d = (run.id for run in runs)
    for _ in range(50):
        queue.move(runs[2], -1)
        assert queue.waiting() == [a, c, b, d]
        queue.move(runs[1], -1)
        assert queue.waiting() == [a, b, c, d]


STRAY = (
    "stray",
    "12.",
    "12.run",
    ".lock",
    "x.run",
    "-1.run",
    "1..",
    "1...",
    "9" * 30 + ".run",
    "7\u0663.run",
)


def test_names_that_are_no_entries_are_ignored(recipe: Recipe) -> None:
    for name in STRAY:
        (queue_dir() / name).touch()
    (queue_dir() / "00000000000000000005.folder").mkdir()
    (queue_dir() / "00000000000000000006.link").symlink_to("stray")
    assert queue.waiting() == []
    run, other = create(recipe), create(recipe)
    queue.enqueue(run)
    queue.enqueue(other)
    queue.move(other, -1)
    assert queue.waiting() == [other.id, run.id]
    assert queue.withdraw(run) and queue.remove(other)
    assert queue.waiting() == []
    assert len(stray_names()) == len(STRAY) + 2


def test_an_entry_whose_status_was_not_written_is_queued_again(recipe: Recipe) -> None:
    run = create(recipe)
    queue.enqueue(run)
    write_status(run, Status(state="paused", at=1.0, step=7))
    queue.enqueue_again(run)
    assert queue.waiting() == [run.id]
    assert (read_status(run).state, read_status(run).step) == ("queued", 7)


def test_a_taken_run_is_starting_and_waits_no_longer(recipe: Recipe) -> None:
    run = create(recipe)
    queue.enqueue(run)
    queue.take(run, mark())
    assert queue.waiting() == [] and read_status(run).state == "starting"
