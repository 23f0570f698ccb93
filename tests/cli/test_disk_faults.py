"""A disk that cannot be written: each command says what, why and what to do, without a traceback."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_tui import paths
from qlora_tui.cli import main
from qlora_tui.errors import UserError
from qlora_tui.gpu import torch_env
from qlora_tui.recipe.schema import Model, Recipe
from qlora_tui.runs import describe, doctor, run_queue
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import Status, read_status, write_status
from qlora_tui.runs.view import RunView
from tests.cli.conftest import Call
from tests.support.power import FaultyDisk, refuse_locks


@pytest.fixture
def run() -> RunDir:
    run = create_run(Recipe(name="tickets", model=Model(id="acme/tiny")))
    write_status(run, Status(state="running", at=time.time(), process=process_identity()))
    return run


@pytest.mark.parametrize(
    ("code", "title"),
    [
        (errno.ENOSPC, "No space left on the disk"),
        (errno.EROFS, "The file system is read-only"),
        (errno.EACCES, "Permission denied"),
    ],
)
@pytest.mark.parametrize(
    "words", [("pause",), ("ask", "{}", "checkpoint"), ("runs", "rename", "{}", "other")]
)
def test_what_cannot_be_written_is_said_with_what_to_do(
    call: Call, run: RunDir, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, title: str
) -> None:
    FaultyDisk(monkeypatch, 1, code, lasting=True)
    filled = [word.format(run.id) for word in words]
    said = call(*filled, *([run.id] if len(words) == 1 else []))
    assert said.code == 1
    assert said.err.startswith(f"qlora-tui: {title}: ")
    assert "XDG_STATE_HOME" in said.err
    assert "Traceback" not in said.err and "mistake" not in said.err


def test_a_state_folder_that_is_a_file_is_said(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = paths.state_dir() / "file"
    in_the_way.touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(in_the_way))
    said = call("runs")
    assert said.code == 1
    assert "A file is where a folder should be" in said.err


_WAITS_FOR_SIGTERM = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
print(flush=True)
signal.pause()
"""


def test_stop_signals_the_trainer_when_the_disk_is_full(
    call: Call, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = subprocess.Popen([sys.executable, "-c", _WAITS_FOR_SIGTERM], stdout=subprocess.PIPE)
    try:
        assert trainer.stdout is not None and trainer.stdout.readline()
        write_status(run, Status(state="running", at=time.time(), process=process_identity(trainer.pid)))
        assert run_queue.waiting() == []
        with monkeypatch.context() as full:
            FaultyDisk(full, 1, errno.ENOSPC, lasting=True)
            said = call("stop", run.id)
        assert said.code == 0, said.err
        assert trainer.wait(60) == 42
    finally:
        trainer.kill()
        trainer.communicate()


def test_a_trainer_that_is_only_starting_is_sent_no_signal(
    call: Call, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_status(run, Status(state="starting", at=time.time(), process=process_identity()))
    assert run_queue.waiting() == []
    FaultyDisk(monkeypatch, 1, errno.ENOSPC, lasting=True)
    assert "No space left on the disk" in call("stop", run.id).err


@pytest.mark.parametrize("at", range(1, 8))
def test_stop_removes_a_queued_run_on_a_full_disk(
    call: Call, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    run = create_run(Recipe(name="owls", model=Model(id="acme/tiny")))
    run_queue.enqueue(run)
    with monkeypatch.context() as full:
        FaultyDisk(full, at, errno.ENOSPC, lasting=True)
        said = call("stop", run.id)
    is_out = run.id not in run_queue.waiting()
    assert (said.code == 0) == is_out
    assert read_status(run).state == ("stopped" if is_out else "queued")


def test_a_log_that_cannot_be_written_refuses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    paths.log_path().mkdir()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = logger.handlers[:]
    logger.handlers.clear()
    try:
        torch_env._log_bitsandbytes_warnings()
        logger.warning("an optional kernel is missing")
        logger.warning("another, too")
    finally:
        logger.handlers[:] = before
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(paths.log_path()) in said


def test_a_folder_in_place_of_a_file_is_said(call: Call, run: RunDir) -> None:
    run.name_path.mkdir()
    said = call("runs", "rename", run.id, "other")
    assert said.code == 1 and "A folder is where a file should be" in said.err


def test_a_limit_on_the_size_of_files_is_said(run: RunDir) -> None:
    script = f"ulimit -f 0; exec {sys.executable} -m qlora_tui runs rename {run.id} other"
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert "A file grew past the limit" in said.stderr and "ulimit -f unlimited" in said.stderr


def test_a_state_folder_that_is_a_broken_link_is_said(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "link"))
    said = call("runs")
    assert said.code == 1
    assert "Broken symbolic link" in said.err and str(tmp_path / "nowhere") in said.err


def test_a_bug_is_shown_once_without_a_writable_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: object) -> None:
        raise ZeroDivisionError("by us")

    monkeypatch.setattr("qlora_tui.cli.runs.find_run", broken)
    paths.log_path().mkdir()
    assert main(["pause", "x"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("qlora-tui: Internal error: ZeroDivisionError: by us\n")
    assert said.count("Traceback") == 1


def test_a_gpu_that_fails_is_no_bug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr("qlora_tui.cli.runs.find_run", broken)
    assert main(["pause", "x"]) == 1
    assert capsys.readouterr().err.startswith("qlora-tui: The GPU stopped computing: ")


@pytest.fixture
def no_runner(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runners that end at once; how many were started."""
    started: list[str] = []

    def start() -> None:
        started.append("runner")
        (paths.state_dir() / "runner.log").write_text("starting\nFile locks do not work.\n")

    monkeypatch.setattr(describe, "ensure_runner", start)
    monkeypatch.setattr(describe, "GRACE_S", 0.0)
    monkeypatch.setattr(describe, "POLL_S", 0.0)
    return started


def test_a_run_that_no_runner_takes_is_not_waited_for(run: RunDir, no_runner: list[str]) -> None:
    write_status(run, Status(state="stopped", at=time.time()))
    run_queue.enqueue(run)
    with pytest.raises(UserError, match="The run was not started") as caught:
        list(describe.follow_events(RunView(run)))
    assert no_runner == ["runner"], "one more was tried"
    assert caught.value.why == "The runner's log ends: File locks do not work."


def test_doctor_tries_file_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_locks().outcome == "ok"
    assert not (paths.state_dir() / "lock-test").exists()
    refuse_locks(monkeypatch)
    check = doctor.check_locks()
    assert check.outcome == "error"
    assert "No locks available" in check.text and "XDG_STATE_HOME" in check.fix
