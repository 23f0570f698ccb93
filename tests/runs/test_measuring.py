"""Jobs that measure a run, and what is said if they leave no result."""

from __future__ import annotations

import pytest

from qlora_tui.errors import UserError
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.measuring import measuring
from qlora_tui.runs.row_losses import measure_row_losses
from qlora_tui.runs.task_metrics.task_evaluation import evaluate_task


def test_a_gpu_that_fails_is_reported_in_words(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_tui.gpu.torch_env.configure_torch_env", lambda variables: None)
    with pytest.raises(UserError, match="The GPU stopped computing"), measuring(run.path):
        raise RuntimeError("CUDA error: unspecified launch failure")


def test_a_process_that_leaves_no_result_is_an_error(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_tui.runs.measuring.run_job", lambda *arguments, **options: None)
    with pytest.raises(UserError, match=r"task_evaluation\.json cannot be read"):
        evaluate_task(run)
    with pytest.raises(UserError, match=r"row_losses\.json cannot be read"):
        measure_row_losses(run)
