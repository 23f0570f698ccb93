"""Runs on a cluster as the files say, without a cluster: targets, scripts, time limits and states."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec
import pytest
from msgspec import structs

from qlora_tui.errors import UserError
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions, slurm, slurm_time
from qlora_tui.runs.data_checks import RunLength
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import append_event
from qlora_tui.runs.events import Environment, Failed, Started, Step
from qlora_tui.runs.expected_time import ExpectedTime
from qlora_tui.runs.gate import Gate
from qlora_tui.runs.outcomes import determine_outcome
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.runner import _Queue
from qlora_tui.runs.slurm import SeenJob, Submission, Target
from qlora_tui.runs.status import Status, read_status, refuse_other_machines, write_status


def program(folder: Path, name: str, body: str) -> None:
    """A command of a cluster, as far as a test needs it."""
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which commands are looked for first."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def target(text: str) -> Target:
    (slurm.targets_dir() / "gpus.toml").write_text(text)
    return slurm.load_target("gpus")


def on_cluster(run: RunDir, seen: SeenJob | None = None) -> RunDir:
    run.slurm_path.write_bytes(msgspec.json.encode(Submission(target="gpus", job="12")))
    if seen is not None:
        run.squeue_path.write_bytes(msgspec.json.encode(seen))
    return run


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('partitoin = "a"', "partitoin"),
        ('time = "soon"', "time is 'soon'"),
        ('extra = ["--signal=USR1@5"]', "--signal=USR1@5"),
        ('extra = ["-t5"]', "-t5"),
        ('extra = ["8"]', "not an option"),
        ('account = "a\\nb"', "a line break"),
    ],
)
def test_a_target_that_cannot_be_meant_is_refused(text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        target(text)
    assert says in error.value.what


def test_a_missing_target_says_how_to_write_one() -> None:
    with pytest.raises(UserError) as error:
        slurm.load_target("../gpus")
    assert 'gres = "gpu:1"' in error.value.fix


def test_without_slurm_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as error:
        slurm.require_installed()
    assert "sudo apt install slurm-client" in error.value.fix


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("4:00:00", 14400), ("1-12", 129600), ("1-12:30:05", 131405), ("", None)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int | None) -> None:
    assert slurm.parse_limit(text) == seconds
    assert seconds is None or slurm.parse_limit(slurm.format_limit(seconds)) == seconds


def test_a_script_saves_before_the_limit_and_starts_again(run: RunDir) -> None:
    odd = RunDir(Path("/home/a user/50%"))
    script = slurm.job_script(odd, Target(account="lab", extra=("--mem=64G",)), 5400, gpus=2)
    assert "#SBATCH --signal=B:TERM@120\n#SBATCH --requeue\n" in script
    assert "#SBATCH '--output=/home/a user/50%%/slurm.log'\n" in script
    assert "#SBATCH --gres=gpu:2\n#SBATCH --account=lab\n#SBATCH --time=01:30:00\n" in script
    assert "\ntrap '' TERM\nexec " in script
    assert script.splitlines()[-1].startswith("exec ") and script.endswith(" '/home/a user/50%'\n")


@pytest.mark.parametrize(
    ("recorded", "seen", "state", "says"),
    [
        ("queued", None, "queued", "was submitted"),
        (
            "queued",
            SeenJob(at=2e9, states=("PENDING",), reason="Priority"),
            "queued",
            "Waiting in Slurm (Priority)",
        ),
        ("queued", SeenJob(at=2e9, states=("CANCELLED",)), "stopped", "has ended: cancelled"),
        ("queued", SeenJob(at=1.0, states=("TIMEOUT",)), "queued", "has ended"),
        # Its node is gone, and no heartbeat comes.
        ("running", None, "lost", "another machine (node7)"),
        (
            "running",
            SeenJob(at=2e9, states=("PENDING",), reason="BeginTime"),
            "queued",
            "Waiting in Slurm (BeginTime)",
        ),
        ("running", SeenJob(at=1.0, states=("RUNNING",), nodes="node7"), "running", "does not respond"),
        ("running", SeenJob(at=2e9, states=("NODE_FAIL",)), "lost", "has ended: node fail"),
        ("running", SeenJob(at=2e9), "lost", "has ended."),
        ("finished", SeenJob(at=2e9, states=("FAILED",)), "finished", ""),
    ],
)
def test_the_state_follows_from_the_files_and_then_from_slurm(
    run: RunDir, recorded: str, seen: SeenJob | None, state: str, says: str
) -> None:
    on_cluster(run, seen)
    slurm.asked_path().touch()
    process = structs.replace(process_identity(), host="node7", boot_id="another")
    status = msgspec.convert({"state": recorded, "at": time.time() - 300}, Status)
    write_status(run, structs.replace(status, process=process))
    now = read_status(run)
    assert now.state == state and says in now.detail
    # It was long ago that Slurm answered: the files decide.
    os.utime(slurm.asked_path(), (1, 1))
    assert recorded != "running" or read_status(run).state == "lost"


def test_no_runner_takes_a_run_of_a_cluster_and_no_machine_is_refused_for_it(run: RunDir) -> None:
    process = structs.replace(process_identity(), host="node7", boot_id="another")
    write_status(run, Status(state="running", at=time.time(), process=process))
    with pytest.raises(UserError):
        refuse_other_machines()
    on_cluster(run)
    refuse_other_machines()
    assert "On node7" in read_status(run).detail
    write_status(run, Status(state="running", at=0.0, process=process))
    assert read_status(run).state == "lost"
    _Queue(Gate()).work()
    assert read_status(run).state == "lost"


def test_a_refused_job_leaves_no_run_and_a_refused_resume_no_change(
    recipe: Recipe, run: RunDir, commands: Path
) -> None:
    program(commands, "sbatch", "echo 'sbatch: error: invalid partition specified: gpus' >&2; exit 1")
    program(commands, "squeue", "echo '{\"jobs\": []}'")
    plan = slurm.JobPlan("gpus", target('partition = "gpus"'), None, "")
    before = {path.name for path in run.path.parent.iterdir()}
    with pytest.raises(UserError) as error:
        actions.submit_job(recipe, plan)
    assert "invalid partition specified: gpus" in error.value.what
    assert {path.name for path in run.path.parent.iterdir()} == before
    on_cluster(run)
    write_status(run, Status(state="paused", at=5.0, step=3))
    with pytest.raises(UserError):
        actions.resume(run)
    assert read_status(run) == Status(state="paused", at=5.0, step=3)


def test_a_submission_that_fails_or_is_killed_leaves_a_run_to_resume(run: RunDir, commands: Path) -> None:
    program(commands, "squeue", "echo '{\"jobs\": []}'")
    program(commands, "sbatch", "echo 'sbatch: error: no such account' >&2; exit 1")
    target("")
    on_cluster(run, SeenJob(at=2e9, states=("CANCELLED",)))
    write_status(run, Status(state="queued", at=5.0))
    with pytest.raises(UserError):
        actions.resume(run)
    assert read_status(run).state == "stopped" and "has ended" in read_status(run).detail
    # Killed before sbatch had answered.
    run.slurm_path.write_bytes(msgspec.json.encode(Submission(target="gpus")))
    write_status(run, Status(state="queued", at=time.time()))
    with pytest.raises(UserError) as error:
        actions.stop(run)
    assert "being submitted" in error.value.title
    write_status(run, Status(state="queued", at=time.time() - 100))
    assert read_status(run).state == "stopped" and "was not submitted" in read_status(run).detail
    program(commands, "sbatch", "echo 13")
    actions.resume(run)
    submission = slurm.submission_of(run)
    assert submission is not None and submission.job == "13" and read_status(run).state == "queued"


def test_a_token_is_not_given_to_the_cluster(
    commands: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    program(commands, "sbatch", f"env > {tmp_path}/environment; echo 'Welcome to 2 clusters'; echo '7;other'")
    assert slurm.submit(tmp_path / "job.sh") == "7"
    environment = (tmp_path / "environment").read_text()
    assert "hf_secret" not in environment and "SBATCH_" not in environment and "PYTHONPATH" in environment


def test_a_job_that_still_waits_is_not_submitted_twice(run: RunDir, commands: Path) -> None:
    listed = '{"jobs": [{"job_id": 12, "job_state": ["PENDING"], "state_reason": "Priority"}]}'
    program(commands, "squeue", f"echo '{listed}'")
    program(commands, "sbatch", "exit 9")
    on_cluster(run)
    write_status(run, Status(state="failed", at=5.0))
    with pytest.raises(UserError) as error:
        actions.resume(run)
    assert "Waiting in Slurm (Priority) as job 12." in error.value.what


def test_a_limit_is_proposed_from_measured_speed_and_a_short_one_refused(
    recipe: Recipe, run: RunDir, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(commands, "sbatch", "")
    program(commands, "sinfo", "echo 'short 30:00'; echo 'gpu* 1-00:00:00'")
    on_cluster(run)
    append_event(run.events_path, Started(at=100.0, attempt=1, pid=1))
    environment = Environment(
        device="A100",
        device_kind="cuda",
        device_total_bytes=80 << 30,
        compute_dtype="bfloat16",
        attention="sdpa",
        optimizer="adamw",
        loss="chunked",
        versions={},
    )
    append_event(run.events_path, environment)
    step = Step(
        at=160.0, step=1, epoch=0.0, loss=1.0, learning_rate=1e-4, grad_norm=1.0, tokens=1, tokens_per_s=1.0
    )
    append_event(run.events_path, step)
    length = RunLength(steps_per_epoch=300, all_steps=600, steps=600, tokens=1e6, is_exact=True)
    monkeypatch.setattr(slurm_time, "find_files", lambda model: None)
    monkeypatch.setattr(slurm_time, "run_length", lambda recipe, model: length)
    monkeypatch.setattr(slurm_time, "_time", lambda *rest: ExpectedTime(6000.0, "run", "tickets"))
    recipe = replace_setting(recipe, "training.checkpoint_every", 100)
    target("")
    # 60 s to start, 1.5 times 6,000 s, 120 s to save; in whole five minutes.
    assert slurm_time.plan_job(recipe, "gpus").limit_s == 9300
    target('partition = "short"')
    with pytest.raises(UserError) as error:
        slurm_time.plan_job(recipe, "gpus")
    assert error.value.title == "The time limit is too short" and "00:37:00" in error.value.fix
    target('time = "1:00:00"')
    assert slurm_time.plan_job(recipe, "gpus").limit_s is None
    target('gres = "gpu:1"')
    with pytest.raises(UserError) as error:
        slurm_time.plan_job(replace_setting(recipe, "training.gpus", 2), "gpus")
    assert error.value.title == "Not enough GPUs"


def test_a_run_lost_on_a_node_is_not_blamed_on_this_machine(run: RunDir) -> None:
    process = structs.replace(process_identity(), host="node7", boot_id="another")
    write_status(on_cluster(run), Status(state="running", at=0.0, process=process))
    ending = determine_outcome(run, None)
    assert isinstance(ending, Failed) and ending.title == "The trainer was killed"
