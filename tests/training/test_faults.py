"""A full disk, a lack of memory, a machine restarted: each is told, and the run goes on or can go on."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_tui.runs import actions, control
from qlora_tui.runs.directory import RunDir, create
from qlora_tui.runs.endings import how_it_ended
from qlora_tui.runs.events import CheckpointSaved, Failed, Finished, Health, PhaseChanged, Started, Stopped
from qlora_tui.runs.status import read_status
from tests.training.conftest import MakeRecipe, Trainers
from tests.training.told import events, last_step, told
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("training")]

LONG = {"training.epochs": 60.0, "training.checkpoint_every": 1000, "training.evaluate_every": 1000}


def small_disk_can_be_mounted() -> bool:
    """Whether this user may mount a tmpfs in a namespace of its own."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not small_disk_can_be_mounted(), reason="no tmpfs may be mounted here")
def test_a_full_disk_costs_the_checkpoint_and_not_the_run(recipe: MakeRecipe) -> None:
    run = create(recipe({"training.checkpoint_every": 2}))
    script = 'mount -t tmpfs -o size=64k none "$1/checkpoints" && exec "$0" -m qlora_tui.training "$1"'
    trainer = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, sys.executable, run.path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert trainer.returncode == 0, trainer.stderr
    assert isinstance(events(run)[-1], Finished)
    full = [health for health in told(run, Health) if health.kind == "disk_full"]
    assert full and not told(run, CheckpointSaved)
    assert (run.adapter_dir / "adapter_model.safetensors").exists()


def test_a_machine_restarted_in_mid_run_is_told_as_that(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create(recipe({**LONG, "training.epochs": 6.0, "training.checkpoint_every": 2}))
    with monkeypatch.context() as before_the_restart:
        before_the_restart.setenv("QLORA_TUI_BOOT_ID", "before")
        trainer = trainers.start(run)
        wait_for(lambda: told(run, CheckpointSaved), seconds=60)
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait()
    monkeypatch.setenv("QLORA_TUI_BOOT_ID", "after")
    assert "restarted" in read_status(run).detail
    ending = how_it_ended(run, None)
    assert isinstance(ending, Failed) and ending.kind == "lost"
    assert trainers.run(run) == 0
    assert told(run, Started)[-1].resumed_from_step > 0
    assert read_status(run).state == "finished"


def test_a_request_that_comes_while_a_checkpoint_is_saved_is_done_after_it(
    recipe: MakeRecipe, trainers: Trainers
) -> None:
    run = create(recipe({**LONG, "training.checkpoint_every": 1}))
    trainer = trainers.start(run)
    wait_for(lambda: any(event.phase == "saving" for event in told(run, PhaseChanged)), seconds=60)
    actions.stop(run)
    control.ask(run, "checkpoint")
    assert trainer.wait() == 0
    ending = events(run)[-1]
    assert isinstance(ending, Stopped)
    assert [event.step for event in told(run, CheckpointSaved)] == list(range(1, ending.step + 1))


def test_a_lack_of_memory_is_told_as_such(recipe: MakeRecipe) -> None:
    run = create(recipe({"data.max_length": 100000, "model.attention": "eager"}))
    _one_long_sample(run)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    trainer = subprocess.run(
        [sys.executable, "-m", "qlora_tui.training", str(run.path)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    ending = events(run)[-1]
    assert isinstance(ending, Failed) and ending.kind == "out_of_memory", trainer.stderr
    assert trainer.returncode == 1
    assert "GiB" in ending.why and last_step(run) == 0


def _one_long_sample(run: RunDir) -> None:
    """Data in which one answer is far longer than all others: the probe must meet it first."""
    source = Path(run.recipe().data.sources[0].path)
    long = source.with_name("long.jsonl")
    answer = "fox " * 40000
    long.write_text(
        source.read_text()
        + '{"messages": [{"role": "user", "content": "go on"}, '
        + f'{{"role": "assistant", "content": "{answer}"}}]}}\n'
    )
    run.recipe_path.write_text(run.recipe_path.read_text().replace(str(source), str(long)))
