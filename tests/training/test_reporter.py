"""What the trainer says of a run that had begun before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.status import Status, read_status, write_status
from qlora_tui.training import checkpoints
from qlora_tui.training import reporter as reporter_module
from qlora_tui.training.checkpoints import CheckpointState
from qlora_tui.training.distributed import DistributedContext
from qlora_tui.training.reporter import Reporter

STATE = CheckpointState(step=1, tokens=1, data_hash="", padding_free=False, recipe="")


class Ended(BaseException):
    """The trainer's process has ended."""


@pytest.mark.parametrize("is_emptied", [True, False])
def test_a_trainer_whose_run_was_deleted_ends(monkeypatch: pytest.MonkeyPatch, *, is_emptied: bool) -> None:
    def end(code: int) -> None:
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(reporter_module, "HEARTBEAT_S", 0.0)
    run = create_run(Recipe())
    reporter = Reporter(run)
    reporter.write_heartbeat()
    shutil.rmtree(run.path)
    if is_emptied:
        # Deleting the folder failed, because something was written to it meanwhile.
        run.path.mkdir()
        run.telemetry_path.touch()
    with pytest.raises(Ended):
        reporter._heartbeat_loop()
    assert not run.path.exists()
    with pytest.raises(OSError):
        checkpoints.write(run, STATE, lambda folder: None, DistributedContext())
    assert not run.path.exists()


@pytest.mark.parametrize("lost", ["recipe.toml", "events.jsonl", "..", ""])
def test_a_run_that_is_not_deleted_goes_on(lost: str, tmp_path: Path) -> None:
    run = create_run(Recipe())
    reporter = Reporter(run)
    if lost == "..":
        run.path.parent.rename(tmp_path / "disk")
    elif lost:
        (run.path / lost).unlink()
    for _ in range(9):
        reporter.write_heartbeat()
    assert reporter._missing_beats == 0


def test_a_runs_earlier_progress_is_reported_before_its_next_step() -> None:
    run = create_run(Recipe())
    write_status(run, Status(state="starting", at=1.0, step=7, total_steps=20, loss=1.5))
    reporter = Reporter(run)
    reporter.start()
    status = read_status(run)
    assert (status.state, status.step, status.total_steps, status.loss) == ("running", 7, 20, 1.5)
    reporter.resume_from(5)
    status = read_status(run)
    assert (status.step, status.total_steps, status.loss) == (5, 20, None)
    reporter.stop()
