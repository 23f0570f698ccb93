"""The runner with real processes. A small script, chosen by the test, replaces the trainer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from msgspec import structs

from qlora_tui import paths
from qlora_tui.cli import main
from qlora_tui.locks import is_locked
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions, run_queue, runner
from qlora_tui.runs.describe import follow_events
from qlora_tui.runs.devices import CPU, devices_of, is_free, run_on
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.event_log import EventTail, last_event
from qlora_tui.runs.events import Failed, Finished, Paused, Started
from qlora_tui.runs.process import LAUNCHER_VARIABLE, process_identity, runner_lock_path
from qlora_tui.runs.status import Status, read_status, write_status
from qlora_tui.runs.view import RunView
from qlora_tui.settings import GPU_VARIABLE
from tests.gpu.test_visible_devices import RTX_3060, RTX_4090
from tests.runs.conftest import launch_of, let_go
from tests.support.nvml_stub import install_nvml_stub
from tests.support.polling import wait_for
from tests.support.power import refuse_locks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("played_trainer")]


def named(recipe: Recipe, name: str) -> Recipe:
    return replace_setting(recipe, "name", name)


def is_(run: RunDir, state: str) -> bool:
    return read_status(run).state == state


def test_queued_runs_are_taken_one_after_the_other(recipe: Recipe) -> None:
    first = actions.submit(named(recipe, "waits"))
    wait_for(lambda: is_(first, "running"))
    second = actions.submit(named(recipe, "plain"))
    assert read_status(second).state == "queued"
    let_go(first)
    wait_for(lambda: is_(second, "finished"))
    assert read_status(first).state == "finished"
    assert run_queue.waiting() == []


def test_runs_on_two_gpus_train_at_once_and_one_on_both_waits_for_both(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvml_stub(monkeypatch, "two_gpus")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    waits = named(recipe, "waits")
    first, second = actions.submit(waits), actions.submit(waits)
    wait_for(lambda: is_(first, "running") and is_(second, "running"))
    _, command, environ = launch_of(first)
    assert command[command.index("--gpu") + 1] == RTX_4090 and "OMP_NUM_THREADS" not in environ
    # The one with the most free memory first.
    assert [str(devices_of(run)) for run in (first, second)] == ["GPU 0 (RTX 4090)", "GPU 1 (RTX 3060)"]
    both, behind = actions.submit(replace_setting(waits, "training.gpus", 2)), actions.submit(waits)
    runner_pid = int((paths.state_dir() / "runner.lock").read_text())
    os.kill(runner_pid, signal.SIGKILL)
    # The trainers hold their GPUs, and the next runner gives the free one to no run that came later.
    let_go(second)
    wait_for(lambda: is_(second, "finished"))
    elsewhere = actions.submit(replace_setting(waits, "training.gpus", 3))
    wait_for(lambda: is_(elsewhere, "failed"))
    assert "Not enough GPUs" in read_status(elsewhere).detail
    assert run_queue.waiting() == [both.id, behind.id] and is_(first, "running")
    assert read_status(both).detail == "Waiting for GPU 0 (RTX 4090) and GPU 1 (RTX 3060)."
    held = devices_of(first)
    assert held is not None and [run_on(key) for key in held.keys] == [first.id]
    let_go(first)
    wait_for(lambda: is_(both, "running"))
    assert str(devices_of(both)) == "GPUs 0 and 1"
    torchrun, command, environ = launch_of(both)
    assert command[command.index("--nproc-per-node") + 1] == "2"
    assert command[command.index("--gpu") + 1] == f"{RTX_4090},{RTX_3060}"
    assert environ["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert environ[LAUNCHER_VARIABLE] == str(torchrun)
    assert read_status(behind).state == "queued"
    let_go(both)
    wait_for(lambda: is_(behind, "running"))
    let_go(behind)
    wait_for(lambda: is_(behind, "finished"))
    assert (first.log_path.read_text(), is_free(CPU)) == ("", True)


@pytest.mark.parametrize("variable", [GPU_VARIABLE, "CUDA_VISIBLE_DEVICES"])
def test_the_gpu_chosen_for_a_run_is_not_that_of_the_next(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    install_nvml_stub(monkeypatch, "two_gpus")
    waits = named(recipe, "waits")
    with monkeypatch.context() as chosen:
        chosen.setenv(variable, "1")
        first = actions.submit(waits)
    wait_for(lambda: is_(first, "running"))
    second, both = actions.submit(waits), actions.submit(replace_setting(waits, "training.gpus", 2))
    for run, gpu in (first, RTX_3060), (second, RTX_4090):
        wait_for(partial(is_, run, "running"))
        _, command, environ = launch_of(run)
        assert command[command.index("--gpu") + 1] == gpu and variable not in environ
        let_go(run)
    wait_for(lambda: is_(both, "running"))
    let_go(both)
    wait_for(lambda: is_(both, "finished"))


@pytest.mark.parametrize("is_allowed", [True, False])
def test_the_machine_stays_awake_while_a_run_trains(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_allowed: bool
) -> None:
    holding = tmp_path / "holding"
    command = f'echo "$1" > {holding}; cat; rm {holding}' if is_allowed else "exit 1"
    program = tmp_path / "systemd-inhibit"
    program.write_text(f"#!/bin/sh\n{command}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run = actions.submit(named(recipe, "waits"))
    wait_for(lambda: is_(run, "running") and holding.exists() == is_allowed)
    let_go(run)
    wait_for(lambda: is_(run, "finished"))
    wait_for(lambda: not holding.exists())


@pytest.mark.parametrize(
    ("trainer", "kind", "what", "fix"),
    [
        ("dies", "killed", "SIGKILL", "resume {}"),
        ("crashes", "bug", "something unforeseen", ""),
        ("says nothing", "lost", "", "resume {}"),
    ],
)
def test_how_a_trainer_ended_without_a_word_is_said(
    recipe: Recipe, trainer: str, kind: str, what: str, fix: str
) -> None:
    run = actions.submit(named(recipe, trainer))
    wait_for(lambda: is_(run, "failed"))
    ending = last_event(run.events_path)
    assert isinstance(ending, Failed) and ending.kind == kind
    assert what in ending.what and fix.format(run.id) in ending.fix


def test_a_run_resumed_while_its_trainer_exits_has_not_failed(recipe: Recipe) -> None:
    run = actions.submit(named(recipe, "pauses"))
    wait_for(lambda: is_(run, "paused"))
    actions.resume(run)
    let_go(run)
    wait_for(lambda: is_(run, "finished"))
    endings = [e for e in EventTail(run.events_path).drain() if isinstance(e, Failed | Paused | Finished)]
    assert [type(ending) for ending in endings] == [Paused, Finished]


@pytest.mark.parametrize(("trainer", "sizes"), [("needs memory", [4, 2, 1]), ("bitsandbytes", [2, 1])])
def test_out_of_memory_is_retried_with_half_the_micro_batch(
    recipe: Recipe, trainer: str, sizes: list[int]
) -> None:
    run = actions.submit(replace_setting(named(recipe, trainer), "training.micro_batch_size", sizes[0]))
    wait_for(lambda: is_(run, "finished"))
    used = [e.micro_batch_size for e in EventTail(run.events_path).drain() if isinstance(e, Started)]
    assert used == sizes


def test_a_second_runner_leaves_at_once(recipe: Recipe) -> None:
    run = actions.submit(named(recipe, "waits"))
    wait_for(lambda: is_(run, "running"))
    second = subprocess.run([sys.executable, "-m", "qlora_tui.runs.runner"], timeout=20, check=False)
    assert second.returncode == 0
    assert read_status(run).state == "running"
    let_go(run)
    wait_for(lambda: is_(run, "finished"))


def test_a_suspended_runner_is_said_with_how_to_continue_it(recipe: Recipe) -> None:
    first = actions.submit(named(recipe, "waits"))
    wait_for(lambda: is_(first, "running"))
    second = actions.submit(named(recipe, "plain"))
    assert read_status(second).detail == ""
    runner_pid = int((paths.state_dir() / "runner.lock").read_text())
    os.kill(runner_pid, signal.SIGSTOP)
    try:
        wait_for(lambda: f"`kill -CONT {runner_pid}`" in read_status(second).detail)
        said: list[str] = []
        followed = follow_events(RunView(second), said.append)
        follower = threading.Thread(target=lambda: list(followed), daemon=True)
        follower.start()
        wait_for(lambda: said)
        assert "runner is suspended" in said[0]
        os.kill(runner_pid, signal.SIGCONT)
        # The first run still holds the queue, so the follower cannot miss it.
        wait_for(lambda: said[1:] == ["The runner responds again."])
    finally:
        os.kill(runner_pid, signal.SIGCONT)
        let_go(first)
    wait_for(lambda: is_(second, "finished"))
    follower.join(60)
    assert not follower.is_alive()


def test_the_next_runner_takes_over_a_killed_runners_trainer(recipe: Recipe) -> None:
    run = actions.submit(named(recipe, "waits"))
    wait_for(lambda: is_(run, "running"))
    runner_pid = int((paths.state_dir() / "runner.lock").read_text())
    os.kill(runner_pid, signal.SIGKILL)
    waiting = actions.submit(named(recipe, "plain"))
    assert read_status(run).state == "running"
    let_go(run)
    wait_for(lambda: is_(waiting, "finished"))
    assert isinstance(last_event(run.events_path), Finished)
    assert read_status(run).state == "finished"


def test_a_run_cut_off_by_a_restart_is_told_so(recipe: Recipe) -> None:
    run = create_run(named(recipe, "plain"))
    write_status(
        run,
        Status(
            state="running",
            at=time.time(),
            process=structs.replace(process_identity(), boot_id="the boot before"),
        ),
    )
    assert "restarted" in read_status(run).detail
    subprocess.run([sys.executable, "-m", "qlora_tui.runs.runner"], timeout=20, check=True)
    ending = last_event(run.events_path)
    assert isinstance(ending, Failed)
    assert ending.kind == "lost"
    assert "restarted" in ending.title
    actions.resume(run)
    wait_for(lambda: is_(run, "finished"))


def test_a_queue_entry_whose_run_was_deleted_is_passed_over(recipe: Recipe) -> None:
    gone = create_run(named(recipe, "plain"))
    run_queue.enqueue(gone)
    for path in sorted(gone.path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    gone.path.rmdir()
    run = actions.submit(named(recipe, "plain"))
    wait_for(lambda: is_(run, "finished"))
    assert run_queue.waiting() == []


def test_a_run_deleted_in_training_is_not_made_again(recipe: Recipe) -> None:
    run = actions.submit(named(recipe, "waits"))
    wait_for(lambda: is_(run, "running"))
    process = read_status(run).process
    assert process is not None
    second = actions.submit(named(recipe, "plain"))
    shutil.rmtree(run.path)
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: is_(second, "finished"))
    assert not run.path.exists()


def test_attaching_to_a_waiting_run_starts_a_runner(recipe: Recipe) -> None:
    run = create_run(named(recipe, "plain"))
    run_queue.enqueue(run)
    assert main(["attach", run.id]) == 0
    assert is_(run, "finished")


def test_one_unwritable_run_does_not_hold_up_the_queue(recipe: Recipe) -> None:
    bad = create_run(named(recipe, "plain"))
    bad.log_path.mkdir()
    run_queue.enqueue(bad)
    good = actions.submit(named(recipe, "plain"))
    wait_for(lambda: is_(good, "finished"))
    assert run_queue.waiting() == [bad.id] and is_locked(runner_lock_path()), "it is tried again later"
    assert f"{bad.id}: [Errno" in (paths.state_dir() / "runner.log").read_text()
    run_queue.remove(bad)
    wait_for(lambda: not is_locked(runner_lock_path()))


def test_a_file_system_without_locks_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_locks(monkeypatch)
    assert runner.main() == 1
    assert "File locks do not work" in capsys.readouterr().err


def test_the_runner_imports_neither_torch_nor_the_estimate() -> None:
    unwanted = {"torch", "textual", "qlora_tui.memory"}
    code = f"import sys, qlora_tui.runs.runner; sys.exit(bool({unwanted} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
