from __future__ import annotations

import errno
import io
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from msgspec import structs

from qlora_tui.gpu.nvml import Nvml
from qlora_tui.locks import locked
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import run_queue, runner
from qlora_tui.runs.devices import CPU, UNKNOWN_GPU, Devices, RunDevice, claimed, record_devices
from qlora_tui.runs.directory import RunDir, create_run, queue_path
from qlora_tui.runs.event_log import append_event, last_event
from qlora_tui.runs.events import Paused, Started, Stopped
from qlora_tui.runs.gate import Gate
from qlora_tui.runs.holds import Hold
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import Status, is_stranded, read_status, write_status
from qlora_tui.runs.supervision import Supervisor
from tests.gpu.test_visible_devices import RTX_3060, RTX_4090
from tests.support.nvml_stub import install_nvml_stub
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


def test_a_run_that_is_read_while_it_is_queued_has_not_stopped(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, seen = run_queue._write, []

    def read_first(ids: list[str]) -> None:
        seen.append(read_status(run).state)
        write(ids)

    write_status(run, Status(state="paused", at=1.0))
    monkeypatch.setattr(run_queue, "_write", read_first)
    run_queue.requeue(run)
    assert seen == ["queued"] and run_queue.waiting() == [run.id]
    # A process that was killed in between leaves it out of the queue.
    write([])
    assert is_stranded(run)
    before = run.status_path.read_bytes()
    run_queue.hold(run, Hold(cause="devices", devices="2 GPUs"))
    assert not run_queue.pause(run) and run.status_path.read_bytes() == before
    run_queue.requeue(run)
    assert run_queue.waiting() == [run.id]


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


def test_a_trainer_without_a_status_is_waited_for(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_runner = structs.replace(process_identity(), start_ticks=1)
    write_status(run, Status(state="starting", at=1.0, process=killed_runner))
    with ExitStack() as trainer:
        trainer.enter_context(locked(run.trainer_lock_path))

        def end() -> None:
            write_status(run, Status(state="finished", at=2.0))
            trainer.close()

        while_it_sleeps(monkeypatch, end)
        runner._take_over(run, Devices(()), Supervisor(Gate().hold))
    assert read_status(run).state == "finished"


GPUS = [RunDevice(RTX_4090, 0, "RTX 4090"), RunDevice(RTX_3060, 1, "RTX 3060")]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Id and devices of each run that is started; none of them trains. The machine has two GPUs."""
    install_nvml_stub(monkeypatch, "two_gpus")
    started: list[tuple[str, str]] = []

    def start(queue: runner._Queue, run: RunDir, devices: Devices, work: object) -> None:
        started.append((run.id, str(devices)))
        run_queue.remove(run)

    monkeypatch.setattr(runner._Queue, "_start", start)
    return started


def test_runs_that_a_full_disk_kept_waiting_are_started_later(
    recipe: Recipe, started: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [create_run(recipe) for _ in range(3)]
    for run in runs:
        run_queue.enqueue(run)
    runs[0].recipe_path.unlink()
    log = FullLog()
    queue = runner._Queue(Gate())
    with monkeypatch.context() as full:
        full.setattr(sys, "stderr", log)
        FaultyDisk(full, 1, errno.ENOSPC, lasting=True)
        queue._start_runs()
    assert [run.id for run in runs if run.id in log.refused] == [run.id for run in runs], "each was tried"
    queue._start_runs()
    assert started == [] and run_queue.waiting() == [run.id for run in runs], "not at once"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + runner.POSTPONE_S)
    queue._start_runs()
    assert [name for name, _ in started] == [run.id for run in runs[1:]] and not run_queue.waiting()


@pytest.mark.parametrize("scenario", ["mismatch", "broken", "no_permission", "lost", "unsupported"])
def test_no_run_starts_on_a_gpu_that_may_be_taken(
    run: RunDir,
    recipe: Recipe,
    started: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    scenario: str,
) -> None:
    both = create_run(replace_setting(recipe, "training.gpus", 2))
    queue, waiting = runner._Queue(Gate()), [run] if scenario == "unsupported" else [run, both]
    for each in waiting:
        run_queue.enqueue(each)
    with claimed(Devices((GPUS[0],))), monkeypatch.context() as failing:
        install_nvml_stub(failing, scenario)
        queue._start_runs()
        assert started == [] and run_queue.waiting() == [each.id for each in waiting]
    install_nvml_stub(monkeypatch, "two_gpus")
    queue._start_runs()
    assert started[0] == (run.id, "GPU 0 (RTX 4090)")


def test_a_gpu_may_be_the_one_that_the_driver_did_not_name(
    run: RunDir, started: list[tuple[str, str]]
) -> None:
    run_queue.enqueue(run)
    with claimed(Devices((RunDevice(UNKNOWN_GPU),))):
        runner._Queue(Gate())._start_runs()
    assert started == []


@pytest.mark.parametrize("hold", [None, Hold(cause="program", program="game", pid=7)])
def test_a_run_that_gave_way_goes_on_on_its_gpu_only(
    run: RunDir, started: list[tuple[str, str]], hold: Hold | None
) -> None:
    folder = run.checkpoints_dir / "step-2"
    folder.mkdir()
    (folder / "complete").touch()
    record_devices(run, Devices((GPUS[1],), is_choice=True))
    append_event(run.events_path, Paused(step=2, hold=hold))
    run_queue.enqueue(run)
    queue = runner._Queue(Gate())
    with claimed(Devices((GPUS[1],))):
        queue._start_runs()
    if hold is not None:
        waits_for = Hold(cause="devices", devices="GPU 1 (RTX 3060)")
        assert started == [] and read_status(run).hold == waits_for
        queue._start_runs()
        assert started.pop() == (run.id, "GPU 1 (RTX 3060)")
    else:
        assert started.pop() == (run.id, "GPU 0 (RTX 4090)")
        run_queue.enqueue(run)
        queue._start_runs()
        assert started.pop() == (run.id, "GPU 1 (RTX 3060)"), "if it is free"


def test_a_long_queue_asks_the_driver_once_a_look(
    recipe: Recipe, started: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        run_queue.enqueue(create_run(recipe))
    queue, opened, open_driver = runner._Queue(Gate()), list[Nvml](), Nvml.__init__

    def count(driver: Nvml) -> None:
        opened.append(driver)
        open_driver(driver)

    with claimed(Devices(tuple(GPUS))):
        queue._start_runs()
        monkeypatch.setattr(Nvml, "__init__", count)
        queue._start_runs()
    assert len(opened) == 1 and started == []


def test_a_run_whose_device_was_taken_meanwhile_is_tried_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_queue.enqueue(run)
    queue = runner._Queue(Gate())
    with claimed(Devices((RunDevice(CPU),))), monkeypatch.context() as before:
        before.setattr(runner, "taken_keys", set)
        queue._start_runs()
        (thread, _), *_ = queue._training.values()
        thread.join()
    assert [each.id for each in queue.waiting()] == [run.id] and read_status(run).state == "queued"


def test_the_next_runner_queues_a_held_run_that_a_crash_left_in_no_queue(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_event(run.events_path, Started(attempt=1, pid=1))
    append_event(run.events_path, Paused(step=3, hold=Hold(cause="hours", until=time.time() + 60)))
    write_status(run, Status(state="paused", at=time.time(), step=3))
    run.unreported_path.touch()

    def crash(ids: list[str]) -> None:
        raise SystemExit

    with monkeypatch.context() as crashing, pytest.raises(SystemExit):
        crashing.setattr(run_queue, "_write", crash)
        run_queue.requeue(run, first=True)
    assert run_queue.waiting() == [] and runner._is_unsettled(run)
    runner._take_over(run, Devices(()), Supervisor(Gate().hold))
    assert run_queue.waiting() == [run.id]
