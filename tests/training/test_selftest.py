"""``doctor`` trains a model by the real trainer, and says what that run said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qlora_tui import worker
from qlora_tui.paths import state_dir
from qlora_tui.training import selftest
from tests.training.test_faults import inject_fault

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("quick_trainers")
def test_a_run_of_two_layers_shows_that_training_works() -> None:
    findings, on_gpu = selftest._train()
    (finding,) = findings
    assert finding.outcome == "ok" and "adamw" in finding.text and not on_gpu
    first, last = map(float, finding.text.rpartition("loss ")[2].split(" → "))
    assert last < first
    assert not (state_dir() / "runs").exists()


@pytest.mark.usefixtures("quick_trainers")
def test_what_a_run_reports_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    inject_fault(monkeypatch, "refuse_kernels()")
    findings, _ = selftest._train()
    assert findings[-1].outcome == "warning"
    assert "No C compiler" in findings[-1].text and "model.kernels" in findings[-1].fix


def test_a_trainer_that_dies_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dying = [sys.executable, "-c", "import sys; sys.exit('no kernel image')"]
    monkeypatch.setattr(worker, "module_argv", lambda module, *args: dying)
    ((finding,), _) = selftest._train()
    assert finding.outcome == "error" and "code 1: no kernel image" in finding.text and finding.fix
