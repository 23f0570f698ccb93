"""Child processes that measure a run, and what is said where they end without a result."""

from __future__ import annotations

import pytest

from qlora_tui.errors import UserError
from qlora_tui.runs import measuring_worker, row_loss_job
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.measuring import MeasuringStoppedError, StopSwitch, measure_in_child
from qlora_tui.runs.row_loss_job import measure_row_losses
from qlora_tui.runs.task_metrics import task_job
from qlora_tui.runs.task_metrics.task_job import evaluate_task

FAILS, DOES_NOTHING = "no_such_module", "this"


def test_a_process_that_fails_names_its_last_line(run: RunDir) -> None:
    with pytest.raises(UserError, match="ended with code 1") as caught:
        measure_in_child(FAILS, run, lambda done, total: None)
    assert f"No module named {FAILS}" in caught.value.why


def test_a_gpu_that_fails_is_reported_in_words(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(run: RunDir) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(measuring_worker, "end_with_parent", lambda: None)
    monkeypatch.setattr(measuring_worker, "configure_torch_env", lambda variables: None)
    assert measuring_worker.run_measurement(run.path, fail) == 1
    assert "The GPU stopped computing" in capsys.readouterr().out


def test_a_measurement_that_is_stopped_says_so(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_job, "WORKER", FAILS)
    switch = StopSwitch()
    switch.stop()
    with pytest.raises(MeasuringStoppedError):
        evaluate_task(run, switch=switch)


def test_a_process_that_leaves_no_result_is_an_error(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_job, "WORKER", DOES_NOTHING)
    monkeypatch.setattr(row_loss_job, "WORKER", DOES_NOTHING)
    with pytest.raises(UserError, match=r"task_evaluation\.json cannot be read"):
        evaluate_task(run)
    with pytest.raises(UserError, match=r"row_losses\.json cannot be read"):
        measure_row_losses(run)
