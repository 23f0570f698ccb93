"""Runs on a real Slurm cluster of one node: what ends a job ends no run."""

from __future__ import annotations

import json
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
from qlora_tui.runs.status import read_status
from tests.support.polling import wait_for
from tests.support.slurm import Cluster, cluster
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events, events_of, last_step, losses

__all__ = ["cluster"]
pytestmark = pytest.mark.slow

# A step of half a second, so that a signal comes within one.
SETTINGS: dict[str, Any] = {
    "lora.dropout": 0.1,
    "data.max_length": 32,
    "training.gradient_accumulation": 32,
    "training.epochs": 200.0,
    "training.max_steps": 10,
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


def is_over(run: RunDir) -> bool:
    refresh([run], is_due=True)
    return read_status(run).state in ("lost", "failed")


def test_a_run_whose_job_ends_goes_on_exactly(
    cluster: Cluster,
    recipe: MakeRecipe,
    trainers: Trainers,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    whole = create_run(recipe(SETTINGS))
    assert trainers.run(whole) == 0
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

    # What a time limit sends to the script, here within a step.
    cluster.call("scancel", "--batch", "--signal=TERM", job)
    wait_for(lambda: events_of(run, Paused))
    paused = events_of(run, Paused)[0]
    assert paused.hold is not None and paused.hold.cause == "limit" and 2 <= paused.step < 10
    assert events_of(run, CheckpointSaved)[-1].step == paused.step
    assert main(["stop", behind.id]) == 0
    assert is_(behind, "stopped") and cluster.states(job_of(behind)) == ["CANCELLED"]

    # Slurm starts it again. Its daemon on the node is killed then, and started again.
    cluster.hurry(job)
    wait_for(lambda: len(events_of(run, Started)) == 2)
    assert events_of(run, Started)[1].resumed_from_step == paused.step
    reaches(run, paused.step + 1)
    cluster.kill_node()
    reaches(run, paused.step + 3)
    cluster.start_node()
    wait_for(lambda: is_(run, "finished"))
    assert losses(run) == losses(whole), "to the last bit"
    wait_for(lambda: cluster.states(job) == ["COMPLETED"])
    assert [type(event) for event in events(run)].count(Queued) == 2


def test_a_time_limit_pauses_and_a_cancelled_job_stops_its_run(
    cluster: Cluster, recipe: MakeRecipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(dump(recipe(SETTINGS | {"training.max_steps": 1000})))
    write_target('gres = "gpu:1"\nextra = ["--mem=500", "--no-kill"]\n')
    run = train(file, capsys)
    reaches(run, 2)
    # Two minutes before the end of one minute have begun.
    cluster.call("scontrol", "update", f"JobId={job_of(run)}", "TimeLimit=1")
    wait_for(lambda: events_of(run, Paused) and is_(run, "queued"), seconds=120)
    assert main(["pause", run.id]) == 0 and is_(run, "paused")
    wait_for(lambda: cluster.states(job_of(run)) == ["CANCELLED"])
    before = job_of(run)
    assert main(["resume", run.id]) == 0 and job_of(run) != before
    step = events_of(run, Paused)[0].step
    reaches(run, step + 2)
    cluster.call("scancel", job_of(run))
    wait_for(lambda: is_(run, "stopped"))
    assert (run.adapter_dir / "adapter_model.safetensors").exists()
    # A job whose processes are all killed can say nothing: Slurm does.
    assert main(["resume", run.id]) == 0
    reaches(run, last_step(run) + 1)
    cluster.kill(job_of(run))
    wait_for(lambda: is_over(run))
