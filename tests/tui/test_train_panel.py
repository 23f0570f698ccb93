from __future__ import annotations

from typing import Any

import msgspec
import pytest

from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.recipe.fields import fields
from qlora_tui.runs import event_log, telemetry
from qlora_tui.runs.telemetry import EnergyMeter, Reading, encode
from qlora_tui.tui.screens.train.gpu_panel import GpuPanel, MachineState
from qlora_tui.tui.setting_stepper import step_value
from tests.tui.fake_runs import GIB, FakeRun, write_fake_run

GPU = GpuMetrics(
    at=100.0,
    index=0,
    utilization_percent=50,
    memory_used_bytes=12 * GIB,
    memory_total_bytes=24 * GIB,
    power_w=300.0,
    power_limit_w=450.0,
    temperature_c=61,
    sm_clock_mhz=2520,
    fan_percent=40,
    throttle=(),
)


def sample(at: float, **changes: Any) -> Reading:
    gpu = msgspec.structs.replace(GPU, at=at, **changes)
    return Reading(at=at, rss_bytes=3 * GIB, cpu_percent=104.0, gpu=gpu)


def drawn(machine: MachineState, width: int = 30, height: int = 24) -> list[str]:
    panel = GpuPanel()
    panel.show(machine)
    return [line.plain for line in panel.draw(width, height)]


def test_a_missing_gpu_value_is_na_and_never_zero() -> None:
    nothing = Reading(at=1.0, rss_bytes=GIB, cpu_percent=1.0, gpu=GpuMetrics(at=1.0, index=0))
    for height in (24, 2):
        text = "\n".join(drawn(MachineState("RTX 4090", (nothing,)), 80, height))
        assert text.count("NA") >= 5
        assert " 0" not in text.replace(" 0%", "")


def test_energy_is_summed_over_readings_and_not_over_pauses() -> None:
    run = write_fake_run(FakeRun(steps=0))
    seconds = [*range(100), *range(5000, 5100)]
    run.telemetry_path.write_bytes(
        b"".join(encode(sample(float(s), power_w=360.0)) for s in seconds) + b"{torn"
    )
    meter = EnergyMeter(run.telemetry_path)
    meter.read()
    assert meter.kwh == pytest.approx(2 * 99 * 360 / 3.6e6)
    with run.telemetry_path.open("ab") as file:
        file.write(b"\n" + encode(sample(5100.0, power_w=360.0)))
    meter.read()
    assert meter.kwh == pytest.approx((2 * 99 + 1) * 360 / 3.6e6)


def test_a_weeks_energy_is_shown_once_read_without_delay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_log, "_READ_BYTES", 1000)
    monkeypatch.setattr(telemetry, "MAX_PIECES", 2)
    run = write_fake_run(FakeRun(steps=0))
    run.telemetry_path.write_bytes(b"".join(encode(sample(float(s), power_w=360.0)) for s in range(20)))
    meter = EnergyMeter(run.telemetry_path)
    meter.read()
    assert meter.kwh is None
    for _ in range(20):
        meter.read()
    assert meter.kwh == pytest.approx(19 * 360 / 3.6e6)


def test_without_power_readings_no_energy_is_shown() -> None:
    run = write_fake_run(FakeRun(steps=0))
    run.telemetry_path.write_bytes(b"".join(encode(sample(float(s), power_w=None)) for s in range(9)))
    meter = EnergyMeter(run.telemetry_path)
    meter.read()
    assert meter.kwh is None


@pytest.mark.parametrize(
    ("path", "value", "direction", "after"),
    [
        ("lora.rank", 16, 1, 32),
        ("lora.rank", 24, 1, 32),
        ("lora.rank", 24, -1, 16),
        ("lora.rank", 1, -1, 1),
        ("lora.rank", 1024, 1, 1024),
        ("data.max_length", 2048, -1, 1024),
        ("training.learning_rate", 2e-4, 1, 3e-4),
        ("training.learning_rate", 2e-4, -1, 1e-4),
        ("training.learning_rate", 1e-4, -1, 5e-5),
        ("training.epochs", 2.0, 1, 2.5),
        ("training.epochs", 3.0, 1, 4.0),
        ("training.epochs", 0.5, -1, 0.5),
        ("training.max_steps", 0, 1, 1),
        ("training.max_steps", 100, 1, 200),
        ("training.max_steps", 1, -1, 0),
        ("training.seed", 42, 1, 43),
        ("lora.alpha", 1.0, -1, 1.0),
        ("lora.dropout", 0.0, 1, 0.05),
        ("lora.dropout", 0.05, 1, 0.1),
        ("lora.dropout", 0.9, 1, 0.9),
        ("training.lr_scheduler", "cosine", 1, "linear"),
        ("training.lr_scheduler", "cosine", -1, "constant"),
        ("data.packing", True, 1, False),
    ],
)
def test_a_step_is_a_sensible_one(path: str, value: object, direction: int, after: object) -> None:
    assert step_value(fields()[path], value, direction) == after


@pytest.mark.parametrize("path", ["lora.rank", "lora.alpha", "lora.dropout", "data.max_length"])
@pytest.mark.parametrize("direction", [1, -1])
def test_steps_stay_within_the_bounds(path: str, direction: int) -> None:
    value = fields()[path].default
    for _ in range(60):
        value = step_value(fields()[path], value, direction)
    assert step_value(fields()[path], value, direction) == value
