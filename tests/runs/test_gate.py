"""The runner before the hours, and next to other programs, with real processes and a GPU of the stub."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.gpu.metrics import GpuProcess
from qlora_tui.gpu.visible_devices import visible_gpus
from qlora_tui.hours import Clock
from qlora_tui.locks import is_locked, locked
from qlora_tui.memory.budget import local_budget
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions, run_queue, runner
from qlora_tui.runs.describe import describe, follow_events
from qlora_tui.runs.devices import Devices, RunDevice, devices_of
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.doctor import Machine, check_queue, check_settings, check_yielding
from qlora_tui.runs.event_log import EventTail, append_event
from qlora_tui.runs.events import Finished, Paused, Started
from qlora_tui.runs.gate import Gate, GpuReader, is_own, program_name
from qlora_tui.runs.holds import Hold
from qlora_tui.runs.process import ensure_runner, runner_lock_path
from qlora_tui.runs.status import Status, read_status, write_status
from qlora_tui.runs.supervision import Supervisor
from qlora_tui.runs.view import RunView
from qlora_tui.settings import config_path
from tests.support.nvml_stub import install_nvml_stub
from tests.support.polling import wait_for

HOUR_S = 3600.0
GIB = 1 << 30


class PlayedClock(Clock):
    """A clock that tests set, in which nobody waits."""

    def __init__(self, text: str = "2026-11-30 12:00") -> None:
        super().__init__()
        self.elapsed_s = 0.0
        self.unix = time.mktime(time.strptime(text, "%Y-%m-%d %H:%M"))

    def now(self) -> float:
        return self.unix

    def elapsed(self) -> float:
        return self.elapsed_s

    def zone(self) -> None:
        return None


class FastClock(Clock):
    """A clock in which the seconds that a program must have been gone pass quickly."""

    def elapsed(self) -> float:
        return 20 * time.monotonic()


def write_config(text: str) -> None:
    config_path().parent.mkdir(parents=True, exist_ok=True)
    config_path().write_text(text)
    # Two writes within the clock of the file system are two all the same.
    at = time.time_ns()
    os.utime(config_path(), ns=(at, at))


def closed_hours() -> str:
    """Hours of the day that are not now, nor soon."""
    begin = time.localtime(time.time() + 6 * HOUR_S)
    return f"{begin.tm_hour}:00-{(begin.tm_hour + 2) % 24}:00"


@contextmanager
def running(argv: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block."""
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def kill_runner() -> None:
    os.kill(int((paths.state_dir() / "runner.lock").read_text()), signal.SIGKILL)
    wait_for(lambda: not is_locked(runner_lock_path()))


def obeys(recipe: Recipe) -> Recipe:
    return replace_setting(recipe, "name", "obeys")


def events_of(run: RunDir, kind: type) -> list[object]:
    return [event for event in EventTail(run.events_path).drain() if isinstance(event, kind)]


def test_the_hours_hold_a_run_whatever_the_clock_does(run: RunDir) -> None:
    write_config('hours = "23:00-07:00"')
    clock = PlayedClock("2026-11-30 22:59")
    gate = Gate(clock)
    hold = gate.hours_hold(run)
    assert hold == Hold(cause="hours", until=clock.unix + 60)
    clock.unix += 60
    assert gate.hours_hold(run) is None
    # Set back by an hour, then forward over the night.
    clock.unix -= HOUR_S
    assert gate.hours_hold(run) == Hold(cause="hours", until=clock.unix + HOUR_S)
    clock.unix += 9 * HOUR_S
    assert gate.hours_hold(run) == Hold(cause="hours", until=clock.unix + 16 * HOUR_S)
    run.now_path.touch()
    assert gate.hours_hold(run) is None


def test_settings_with_errors_leave_the_last_ones(run: RunDir) -> None:
    clock = PlayedClock("2026-11-30 12:00")
    gate = Gate(clock)
    assert gate.hours_hold(run) is None
    write_config('hours = "23:00-07:00"')
    assert gate.hours_hold(run) is not None
    write_config('hours = "at night"')
    assert gate.hours_hold(run) is not None
    write_config("")
    assert gate.hours_hold(run) is None


def test_this_programs_processes_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["-m", "qlora_tui.engine"]
    with running([sys.executable, "-c", "input()", *arguments]) as own, running(["cat"]) as other:
        wait_for(lambda: is_own(own.pid))
        wait_for(lambda: program_name(other.pid) == "cat")
        assert is_own(other.pid) is False
        # A trainer of another user has no reason to give way to this one's runs.
        monkeypatch.setattr(os, "getuid", lambda: 65534)
        assert is_own(own.pid) is False
    assert is_own(other.pid) is None and program_name(other.pid) == "another program"


@pytest.fixture
def program() -> Iterator[GpuProcess]:
    """An idle program with much GPU memory, whose process exists."""
    with running(["sleep", "600"]) as process:
        wait_for(lambda: program_name(process.pid) == "sleep")
        yield GpuProcess(process.pid, 5 * GIB, busy_percent=0)


def test_a_new_runner_waits_for_the_same_program(run: RunDir, program: GpuProcess) -> None:
    write_config("yield = true")
    gpus = [RunDevice("GPU-a", 0)]
    assert Gate(PlayedClock(), lambda _: [program]).programs_on(run, gpus) == {}
    hold = Hold(cause="program", program="sleep", pid=program.pid)
    write_status(run, Status(state="queued", at=time.time(), hold=hold))
    assert Gate(PlayedClock(), lambda _: [program]).programs_on(run, gpus) == {"GPU-a": hold}
    # After a restart of the machine the number is another program's.
    other = msgspec.structs.replace(hold, program="game")
    write_status(run, Status(state="queued", at=time.time(), hold=other))
    assert Gate(PlayedClock(), lambda _: [program]).programs_on(run, gpus) == {}


def test_a_program_that_came_while_runs_did_not_yield_is_not_waited_for(
    run: RunDir, program: GpuProcess
) -> None:
    write_config("yield = true")
    processes, clock, gpus = list[GpuProcess](), PlayedClock(), [RunDevice("GPU-a", 0)]
    gate = Gate(clock, lambda _: processes)
    assert gate.programs_on(run, gpus) == {}
    clock.elapsed_s += 8 * HOUR_S
    game = GpuProcess(os.getppid(), 3 * GIB, busy_percent=60)
    processes += [program, game]
    assert gate.programs_on(run, gpus)["GPU-a"].pid == game.pid
    processes.remove(game)
    for _ in range(60):
        clock.elapsed_s += 1
        held = gate.programs_on(run, gpus)
    assert held == {}


def test_a_driver_that_goes_away_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class LostNvml:
        def busy_processes(self, index: int) -> None:
            raise GpuUnavailableError(GpuUnavailableReason.LOST)

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr("qlora_tui.runs.gate.Nvml", LostNvml)
    reader = GpuReader()
    assert reader(0) is None and reader(0) is None and len(set(closed)) == 2


def test_a_held_run_that_is_paused_leaves_the_queue(run: RunDir) -> None:
    run_queue.enqueue(run)
    hold = Hold(cause="hours", until=time.time() + HOUR_S)
    write_status(run, Status(state="queued", at=time.time(), step=4, total_steps=9, loss=1.5, hold=hold))
    assert read_status(run).detail.startswith("Paused until ")
    actions.pause(run)
    status = read_status(run)
    assert (status.state, status.step, status.total_steps, status.hold) == ("paused", 4, 9, None)
    assert run_queue.waiting() == []


@pytest.fixture
def queue(
    played_trainer: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[threading.Thread]:
    """A runner in this process, by a fast clock."""
    (tmp_path / "processes").touch()
    monkeypatch.setenv("NVML_STUB_PROCESSES", str(tmp_path / "processes"))
    install_nvml_stub(monkeypatch, "one_gpu")
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    monkeypatch.setattr(runner, "LOOK_S", 0.2)

    def work() -> None:
        with locked(runner_lock_path()):
            runner._Queue(Gate(FastClock())).work()

    yield threading.Thread(target=work, daemon=True)


@pytest.mark.slow
def test_a_run_gives_way_to_a_program_and_goes_on_after_it(
    recipe: Recipe, queue: threading.Thread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    awake = tmp_path / "awake"
    inhibitor = tmp_path / "systemd-inhibit"
    inhibitor.write_text(f"#!/bin/sh\ntouch {awake}; cat; rm {awake}\n")
    inhibitor.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    write_config("yield = true")
    run = actions.submit(obeys(recipe))
    queue.start()
    wait_for(lambda: read_status(run).state == "running" and awake.exists())
    trainer = read_status(run).process
    assert trainer is not None
    with running(["sleep", "600"]) as game:
        (tmp_path / "processes").write_text(f"{trainer.pid} 9000 90\n{game.pid} 4000 60\n")
        status = wait_for(lambda: ((s := read_status(run)).state == "queued" and s.hold and s) or None)
        assert status.detail == f"Paused for sleep (pid {game.pid})." and status.step == 2
        assert not trainer.is_alive(), "its memory is free"
        assert not awake.exists(), "the machine may sleep"
        game.kill()
    (paused,) = events_of(run, Paused)
    assert isinstance(paused, Paused) and paused.hold == Hold(cause="program", program="sleep", pid=game.pid)
    assert describe(paused) == f"paused at step 2 for sleep (pid {game.pid})"
    (tmp_path / "processes").write_text("")
    wait_for(lambda: read_status(run).state == "running")
    assert read_status(run).hold is None and len(events_of(run, Started)) == 2
    (run.path / "go").touch()
    wait_for(lambda: not queue.is_alive())
    assert len(events_of(run, Finished)) == 1


@pytest.mark.slow
def test_a_program_on_one_gpu_of_two_leaves_a_run_the_other(
    recipe: Recipe, queue: threading.Thread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvml_stub(monkeypatch, "two_gpus")
    write_config("yield = true")
    with running(["sleep", "600"]) as game:
        (tmp_path / "processes").write_text(f"{game.pid} 4000 60 0\n")
        run = actions.submit(obeys(recipe))
        queue.start()
        wait_for(lambda: read_status(run).state == "running")
        trainer, devices = read_status(run).process, devices_of(run)
        assert trainer is not None and devices is not None
        assert [device.index for device in devices.devices] == [1]
        (tmp_path / "processes").write_text(f"{trainer.pid} 9000 90 1\n{game.pid} 4000 60 1\n")
        wait_for(lambda: events_of(run, Paused))
    (run.path / "go").touch()
    wait_for(lambda: not queue.is_alive())


@pytest.mark.slow
def test_a_run_trains_now_although_it_is_held(
    recipe: Recipe, queue: threading.Thread, tmp_path: Path
) -> None:
    write_config(f'hours = "{closed_hours()}"')
    first, second = actions.submit(obeys(recipe)), actions.submit(obeys(recipe))
    queue.start()
    wait_for(lambda: read_status(first).hold)
    assert "Waiting until" in read_status(first).detail
    actions.train_now(second)
    wait_for(lambda: read_status(second).state == "running")
    assert read_status(first).state == "queued"
    (second.path / "go").touch()
    wait_for(lambda: read_status(second).state == "finished")
    wait_for(lambda: not second.now_path.exists())
    wait_for(lambda: read_status(first).hold)
    write_config("")
    (first.path / "go").touch()
    wait_for(lambda: not queue.is_alive())
    assert read_status(first).state == "finished"


@pytest.mark.slow
@pytest.mark.usefixtures("played_trainer")
def test_a_runner_killed_while_a_run_is_held_is_replaced(recipe: Recipe) -> None:
    run = actions.submit(obeys(recipe))
    seen: list[str] = []
    follower = threading.Thread(target=lambda: list(follow_events(RunView(run), seen.append)), daemon=True)
    wait_for(lambda: read_status(run).state == "running")
    follower.start()
    kill_runner()
    # The next runner asks a run that it did not start to give way, too.
    ensure_runner()
    write_config(f'hours = "{closed_hours()}"')
    wait_for(lambda: read_status(run).hold)
    wait_for(lambda: seen)
    assert seen[0].startswith("Paused until ")
    kill_runner()
    write_config("")
    (run.path / "go").touch()
    # The next start of the queue goes on.
    following = actions.submit(obeys(recipe))
    (following.path / "go").touch()
    wait_for(lambda: read_status(following).state == "finished")
    assert read_status(run).state == "finished"
    assert [type(event) for event in EventTail(run.events_path).drain()].count(Started) == 2
    follower.join(60)
    assert not follower.is_alive() and seen[1:] == []


def test_only_a_run_that_can_train_trains_now(run: RunDir) -> None:
    write_status(run, Status(state="finished", at=time.time()))
    with pytest.raises(UserError):
        actions.train_now(run)
    assert not run.trains_now


@pytest.mark.parametrize(("request_kind", "state"), [("stop", "paused"), ("pause_now", "queued")])
def test_a_stop_while_the_trainer_exits_is_not_lost(run: RunDir, request_kind: str, state: str) -> None:
    append_event(run.events_path, Started(attempt=1, pid=1))
    append_event(run.events_path, Paused(step=3, hold=Hold(cause="hours", until=time.time() + HOUR_S)))
    write_status(run, Status(state="paused", at=time.time(), step=3))
    run.unreported_path.touch()
    (run.control_dir / f"1-1-{request_kind}.json").write_text("{}")
    runner._take_over(run, Devices(()), Supervisor(Gate().hold))
    assert read_status(run).state == state
    assert run_queue.waiting() == ([run.id] if state == "queued" else [])


def test_hours_are_said_before_a_launch() -> None:
    machine = Machine(budget=local_budget())
    assert check_queue(machine).outcome == "ok"
    write_config(f'hours = "{closed_hours()}"')
    assert check_queue(machine).text.startswith("The run waits until ")
    write_config('hours = "at night"')
    check = check_queue(machine)
    assert check.outcome == "warning" and "at is neither a day" in check.text
    assert [each.text for each in check_settings()] == [check.text]


def test_processes_of_another_namespace_cannot_be_given_way_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NVML_STUB_PROCESSES", str(tmp_path / "processes"))
    install_nvml_stub(monkeypatch, "one_gpu")
    write_config("yield = true")
    machine = Machine(budget=local_budget(), gpu=visible_gpus()[0])
    outcomes = []
    for pid in (os.getpid(), 1 << 30):
        (tmp_path / "processes").write_text(f"{pid} 9000 90\n")
        outcomes += [check.outcome for check in check_yielding(machine)]
    assert outcomes == ["ok", "warning"]
