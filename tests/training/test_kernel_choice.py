"""When Triton's kernels are tried, and what is said where they are refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import Environment, Finished, Health, LayersKept
from qlora_tui.training.fused import kernel_choice
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of
from tests.training.test_faults import inject_fault

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
COMPILATION_ERROR = """at 2:7:
def _rms_forward(
       ^
Cannot access global variable Any from within @jit'ed function"""


def test_kernels_are_not_used_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernel_choice.find_kernels(torch.device("cpu"), torch.float32) is None


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels whose compiler refuses them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernel_choice, "find_spec", lambda name: object())
    monkeypatch.setattr(kernel_choice, "_verified", {})
    monkeypatch.setattr(kernel_choice, "_refusals", {})
    name = "qlora_tui.training.fused.triton_kernels"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr("qlora_tui.training.fused.triton_kernels", ModuleType(name), raising=False)

    def refuse(*args: object) -> str:
        raise RuntimeError(COMPILATION_ERROR)

    monkeypatch.setattr(kernel_choice, "_first_difference", refuse)


@pytest.mark.usefixtures("refused")
def test_the_reason_is_the_last_line_of_the_error() -> None:
    kernel_choice.verify_kernels(CPU, torch.float32)
    assert kernel_choice.find_kernels(CPU, torch.float32) is None
    reason = kernel_choice.refusal_of_kernels(CPU, torch.float32)
    assert reason == "Cannot access global variable Any from within @jit'ed function"


@pytest.mark.usefixtures("refused")
def test_kernels_left_off_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "_is_allowed", False)
    kernel_choice.verify_kernels(CPU, torch.float32)
    assert kernel_choice.refusal_of_kernels(CPU, torch.float32) == ""


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "gcc python3-dev" in kernel_choice.kernel_remedy()
    (tmp_path / "gcc").touch(mode=0o755)
    assert "install python3-dev" in kernel_choice.kernel_remedy()
    (tmp_path / "Python.h").touch()
    assert "trainer.log" in kernel_choice.kernel_remedy()


def test_a_run_says_that_its_kernels_were_refused(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject_fault(monkeypatch, "refuse_kernels()")
    run = create_run(recipe({"training.gradient_checkpointing": "auto"}))
    assert trainers.run(run) == 0
    (health,) = [event for event in events_of(run, Health) if event.kind == "kernels_refused"]
    assert "No C compiler" in health.evidence and health.severity == "warning"
    assert events_of(run, Environment)[0].kernels == "torch"
    (kept,) = events_of(run, LayersKept)
    assert kept.kept_layers == kept.layers and events_of(run, Finished)
