"""Runs on a real Slurm cluster of one node: what ends a job ends no run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qlora_tui import paths
from qlora_tui.cli import main
from qlora_tui.recipe.toml import dump
from qlora_tui.runs import slurm
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import CheckpointSaved, Paused, Queued, Started
from qlora_tui.runs.run_queue import waiting
from qlora_tui.runs.slurm_runs import refresh
from qlora_tui.runs.status import ACTIVE, read_status
from tests.support.polling import wait_for as wait_seconds_for
from tests.support.quick_starts import TRAINING_MODULES
from tests.support.slurm import Cluster, cluster
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events, events_of, last_step, losses
from tests.training.test_distributed import finished, two_processes

__all__ = ["cluster", "two_processes"]
pytestmark = pytest.mark.slow

wait_for = partial(wait_seconds_for, seconds=180.0)
# Steps of a quarter of a second at least, so that a signal comes within one.
PACE = "from tests.training import fault_injection; fault_injection.keep_pace(0.03)"
SETTINGS: dict[str, Any] = {
    "lora.dropout": 0.1,
    "data.max_length": 32,
    "training.gradient_accumulation": 8,
    "training.epochs": 200.0,
    "training.max_steps": 24,
    "training.checkpoint_every": 100,
}


def write_target(text: str) -> None:
    (slurm.targets_dir() / "here.toml").write_text(text)


def train(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> RunDir:
    assert main(["train", str(recipe_file), "--on", "here", "--detach", "--json"]) == 0
    return RunDir(paths.runs_dir() / json.loads(capsys.readouterr().out)["run"])


def job_of(run: RunDir) -> str:
    submission = slurm.submission_of(run)
    assert submission is not None
    return submission.job


def reaches(run: RunDir, step: int) -> None:
    wait_for(lambda: last_step(run) >= step or "failed" in read_status(run).state, saying=f"step {step}")


def is_(run: RunDir, state: str) -> bool:
    return read_status(run).state == state


def is_lost(run: RunDir) -> bool:
    refresh([run], is_due=True)
    return read_status(run).state == "lost"


def pauses(run: RunDir) -> list[Paused]:
    return [event for event in events_of(run, Paused) if event.hold is not None]


def test_a_run_whose_job_is_taken_away_goes_on_exactly(
    cluster: Cluster,
    recipe: MakeRecipe,
    trainers: Trainers,
    quick_trainers: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    whole = create_run(recipe(SETTINGS))
    assert trainers.run(whole) == 0
    monkeypatch.setenv("BEFORE_TRAINER", PACE)
    file = tmp_path / "recipe.toml"
    file.write_text(dump(recipe(SETTINGS)))
    write_target('partition = "gpu"\ngres = "gpu:2"\ntime = "10"\nextra = ["--mem=500"]\n')
    run = train(file, capsys)
    behind = train(file, capsys)
    job = job_of(run)
    reaches(run, 2)
    assert main(["runs"]) == 0
    listed = capsys.readouterr().out
    assert f", Slurm job {job}." in listed and f"as job {job_of(behind)}." in listed
    # No queue of this machine has them, and nothing here takes them over.
    assert waiting() == [] and not run.unreported_path.exists()
    assert main(["stop", behind.id]) == 0
    assert is_(behind, "stopped") and cluster.states(job_of(behind)) == ["CANCELLED"]

    # A job goes first: the grace time tells the trainer alone.
    cluster.call("sbatch", "--partition=urgent", "--gres=gpu:2", "--output=/dev/null", "--wrap=true")
    wait_for(lambda: pauses(run) and is_(run, "queued"), saying="the preemption")
    assert events_of(run, CheckpointSaved)[-1].step == pauses(run)[0].step
    cluster.hurry(job)
    reaches(run, pauses(run)[0].step + 1)
    # An administrator takes it away: all processes are told.
    cluster.call("scontrol", "requeue", job)
    wait_for(lambda: len(pauses(run)) == 2 and is_(run, "queued"), saying="the requeue")
    cluster.hurry(job)
    reaches(run, pauses(run)[1].step + 1)
    # Slurm's daemon on the node is killed, and started again.
    cluster.kill_node()
    reaches(run, pauses(run)[1].step + 2)
    cluster.start_node()
    wait_for(lambda: is_(run, "finished"))
    assert [started.resumed_from_step for started in events_of(run, Started)][1:] == [
        paused.step for paused in pauses(run)
    ]
    assert losses(run) == losses(whole), "to the last bit"
    # After a preemption Slurm starts a job once more that has completed.
    cluster.hurry(job)
    wait_for(lambda: cluster.states(job) == ["COMPLETED"])
    assert is_(run, "finished")
    assert [type(event) for event in events(run)].count(Queued) == 3


def test_a_run_on_two_gpus_goes_on_exactly(
    cluster: Cluster,
    recipe: MakeRecipe,
    two_processes: None,
    quick_trainers: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    settings = SETTINGS | {"training.gpus": 2}
    whole = finished(recipe(settings))
    held = tmp_path / "held"
    held.mkdir()
    monkeypatch.setenv("BEFORE_TRAINER", f"{PACE}; fault_injection.start_after({str(held)!r})")
    file = tmp_path / "recipe.toml"
    file.write_text(dump(recipe(settings)))
    write_target('extra = ["--mem=500"]\n')
    run = train(file, capsys)
    job = job_of(run)
    assert "gres/gpu:2" in cluster.call("scontrol", "show", "job", job)
    # All processes are told, before the trainers handle signals.
    wait_for(lambda: len(list(held.iterdir())) == 2, saying="both trainers")
    cluster.call("scontrol", "requeue", job)
    shutil.rmtree(held)
    wait_for(lambda: len(pauses(run)) == 1 and is_(run, "queued"), saying="the first requeue")
    cluster.hurry(job)
    reaches(run, 2)
    # As before the time limit: the script alone is told.
    cluster.call("scancel", "--batch", "--signal=TERM", job)
    wait_for(lambda: len(pauses(run)) == 2 and is_(run, "queued"), saying="the pause")
    cluster.hurry(job)
    reaches(run, pauses(run)[1].step + 1)
    # All processes are told: srun, torchrun and both trainers.
    cluster.call("scontrol", "requeue", job)
    wait_for(lambda: len(pauses(run)) == 3 and is_(run, "queued"), saying="the requeue")
    cluster.hurry(job)
    wait_for(lambda: is_(run, "finished"))
    assert [started.resumed_from_step for started in events_of(run, Started)] == [
        0,
        *(paused.step for paused in pauses(run)),
    ]
    assert losses(run) == losses(whole), "to the last bit"


def test_a_job_that_does_not_start_again_leaves_its_run_paused_or_lost(
    cluster: Cluster,
    recipe: MakeRecipe,
    trainers: Trainers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(dump(recipe(SETTINGS | {"training.max_steps": 1000})))
    write_target('gres = "gpu:1"\nextra = ["--mem=500", "--no-kill"]\n')
    run = train(file, capsys)
    wait_for(lambda: read_status(run).state in ACTIVE)
    # The last two minutes of one minute have begun, which Slurm notices within half a minute.
    cluster.call("scontrol", "update", f"JobId={job_of(run)}", "TimeLimit=1")
    wait_for(lambda: pauses(run) and is_(run, "queued"), saying="the time limit")
    assert [paused.hold.cause for paused in pauses(run) if paused.hold] == ["limit"]
    assert main(["pause", run.id]) == 0 and is_(run, "paused")
    # Its processes still end when it is cancelled, and Slurm was to start it again.
    wait_for(lambda: cluster.states(job_of(run)) == ["CANCELLED"])

    before = job_of(run)
    trainers.server.serve(TRAINING_MODULES, monkeypatch)
    assert main(["resume", run.id]) == 0 and job_of(run) != before
    cluster.call("scontrol", "update", f"JobId={job_of(run)}", "Requeue=0")
    reaches(run, last_step(run) + 1)
    cluster.call("scancel", "--batch", "--signal=TERM", job_of(run))
    wait_for(lambda: "did not start" in read_status(run).detail, saying="the refusal")
    assert is_(run, "paused")

    assert main(["resume", run.id]) == 0
    reaches(run, last_step(run) + 1)
    cluster.call("scancel", job_of(run))
    wait_for(lambda: "was canceled" in read_status(run).detail, saying="the cancellation")
    assert is_(run, "paused") and events_of(run, CheckpointSaved)[-1].step == last_step(run)

    # A job whose processes are all killed can say nothing: Slurm does.
    assert main(["resume", run.id]) == 0
    reaches(run, last_step(run) + 1)
    trainer = read_status(run).process
    assert trainer is not None
    cluster.kill(job_of(run))
    os.kill(trainer.pid, signal.SIGKILL)
    wait_for(lambda: is_lost(run))
