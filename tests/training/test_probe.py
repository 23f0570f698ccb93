"""Three steps before a launch: measured in a child that writes no run, and refused if no device is free."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.memory.budget import budget_for
from qlora_tui.runs import step_probe
from qlora_tui.runs.devices import Devices, RunDevice, claimed
from qlora_tui.runs.doctor import Machine
from qlora_tui.runs.expected_time import forecast, measured_forecast
from qlora_tui.runs.step_probe import StepProbe, probe_steps
from qlora_tui.settings import GPU_VARIABLE
from qlora_tui.worker import JobStopped, Progress
from tests.gpu.test_visible_devices import RTX_3060, RTX_4090
from tests.support.nvml_stub import install_nvml_stub
from tests.training.conftest import MakeRecipe

HERE = Machine(budget_for(None))


def files_of_runs() -> list[Path]:
    """Everything where runs are kept."""
    return list(paths.runs_dir().rglob("*"))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_trainers")
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 3),
        ({"training.max_steps": 2}, 2),
        ({"data.preferences": "refuse", "training.replay_share": 0.2}, 3),
    ],
)
def test_a_probe_measures_steps_and_leaves_no_files(
    private_home: Path, recipe: MakeRecipe, settings: dict[str, object], steps: int
) -> None:
    asked, said = recipe(settings), list[Progress]()
    probe = probe_steps(asked, said.append)
    assert probe.steps == steps and probe.seconds > 0 and probe.tokens > 100 * steps
    assert probe.peak_bytes > 100 << 20
    assert files_of_runs() == []
    assert said[-1].done == steps and any("tokenizer" in each.text for each in said)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_trainers")
def test_a_stopped_probe_leaves_no_files(private_home: Path, recipe: MakeRecipe) -> None:
    said = list[Progress]()
    with pytest.raises(JobStopped):
        probe_steps(recipe(), said.append, lambda: any("tokenizer" in each.text for each in said))
    assert files_of_runs() == []


def test_a_probe_takes_a_gpu_that_no_run_has(
    private_home: Path, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvml_stub(monkeypatch, "two_gpus")
    chosen = list[str]()

    def run_job(*arguments: object, environ: dict[str, str], **options: object) -> None:
        chosen.append(environ[GPU_VARIABLE])

    monkeypatch.setattr(step_probe, "run_job", run_job)
    probe_steps(recipe())
    with claimed(Devices((RunDevice(RTX_4090),))):
        probe_steps(recipe({"training.gpus": 2}))
        assert chosen == [RTX_4090, RTX_3060]
        with (
            claimed(Devices((RunDevice(RTX_3060),))),
            pytest.raises(UserError, match=r"A run uses GPU 0 \(RTX 4090\)"),
        ):
            probe_steps(recipe())


def test_what_was_measured_decides_the_time(private_home: Path, recipe: MakeRecipe) -> None:
    asked = recipe({"training.epochs": 4})
    expected = forecast(asked, HERE)
    assert expected is not None and expected.time is None
    probe = StepProbe(steps=3, seconds=6.0, tokens=3_000, peak_bytes=1 << 30)
    known = measured_forecast(expected, probe)
    assert known.time is not None and known.time.seconds == pytest.approx(expected.length.tokens / 500)
    assert known.time.source == "measured in three steps: 2 s per step, peak 1.0 GiB"
