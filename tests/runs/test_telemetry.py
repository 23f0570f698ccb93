"""Energy and tokens per joule from GPU readings, while the clock is changed."""

from __future__ import annotations

import queue
import time

import msgspec
import pytest

from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.gpu.nvml import MetricsSampler
from qlora_tui.runs import event_log, telemetry
from qlora_tui.runs.describe import describe
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Finished
from qlora_tui.runs.telemetry import JOULES_PER_KWH, EnergyMeter, Reading, encode
from tests.support.nvml_stub import install_nvml_stub
from tests.tui.fake_runs import FakeRun, write_fake_run


def sample(at: float, power_w: float | None) -> Reading:
    return Reading(at=at, rss_bytes=1, cpu_percent=1.0, gpu=GpuMetrics(at=at, index=0, power_w=power_w))


def a_reading(monkeypatch: pytest.MonkeyPatch) -> GpuMetrics:
    """A reading of the simulated GPU, with its power."""
    install_nvml_stub(monkeypatch, "one_gpu")
    results: queue.SimpleQueue[object] = queue.SimpleQueue()
    with MetricsSampler(0, results.put, period_s=0.01):
        reading = results.get(timeout=30)
    assert isinstance(reading, GpuMetrics) and reading.power_w is not None
    return reading


def test_a_runs_energy_survives_a_clock_change(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = a_reading(monkeypatch)
    now = time.time()
    # A minute; then the clock is put back an hour, and later two days on: the jumps themselves count nothing.
    stretches = (now, now - 3600, now + 2 * 86400)
    with run.telemetry_path.open("wb") as file:
        for start in stretches:
            for second in range(61):
                at = start + second
                gpu = msgspec.structs.replace(reading, at=at)
                file.write(encode(Reading(at=at, rss_bytes=1, cpu_percent=1.0, gpu=gpu)))
    meter = EnergyMeter(run.telemetry_path)
    meter.read_all()
    assert reading.power_w is not None
    assert meter.kwh == pytest.approx(3 * 60 * reading.power_w / JOULES_PER_KWH)


def test_a_runs_end_reports_energy_and_tokens_per_joule() -> None:
    finished = Finished(
        at=1.0, step=9, seconds=60.0, tokens_per_s=1.0, energy_kwh=0.42, tokens_per_joule=3.125
    )
    assert describe(finished).endswith("0.42 kWh, 3.12 tokens/J")
    assert "kWh" not in describe(Finished(at=1.0, step=9, seconds=60.0, tokens_per_s=1.0))


def test_energy_is_summed_over_readings_and_not_over_pauses() -> None:
    run = write_fake_run(FakeRun(steps=0))
    seconds = [*range(100), *range(5000, 5100)]
    run.telemetry_path.write_bytes(
        b"".join(encode(sample(float(s), power_w=360.0)) for s in seconds) + b"{torn"
    )
    meter = EnergyMeter(run.telemetry_path)
    meter.read()
    assert meter.kwh == pytest.approx(2 * 99 * 360 / 3.6e6)
    two = sample(5100.0, power_w=360.0)
    assert two.gpu is not None
    with run.telemetry_path.open("ab") as file:
        file.write(b"\n" + encode(msgspec.structs.replace(two, other_gpus=(two.gpu,))))
    meter.read()
    # A second GPU begins to report: from 360 to 720 W within the second.
    assert meter.kwh == pytest.approx((2 * 99 + 1.5) * 360 / 3.6e6)


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
