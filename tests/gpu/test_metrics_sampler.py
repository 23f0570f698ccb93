"""The thread that reads the GPU: it is regular, survives a lost GPU, and stops on request."""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading

import pytest

from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.gpu.metrics import GpuMetrics, GpuProcess
from qlora_tui.gpu.metrics_sampler import MetricsSampler
from tests.gpu.test_nvml import REPOSITORY
from tests.support.nvml_stub import install_nvml_stub, stub_env

Samples = queue.SimpleQueue[GpuMetrics | GpuUnavailableError]
SOON_S = 20.0
"""Longer than any of this takes on a busy machine."""


def take_reading(samples: Samples) -> GpuMetrics:
    sample = samples.get(timeout=SOON_S)
    assert isinstance(sample, GpuMetrics)
    return sample


def take_reason(samples: Samples) -> GpuUnavailableReason:
    sample = samples.get(timeout=SOON_S)
    assert isinstance(sample, GpuUnavailableError)
    return sample.reason


def test_readings_come_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    samples: Samples = queue.SimpleQueue()
    with MetricsSampler(0, samples.put, period_s=0.01) as sampler:
        readings = [take_reading(samples) for _ in range(5)]
        assert isinstance(sampler.latest, GpuMetrics)
    assert [reading.utilization_percent for reading in readings] == [91, 92, 93, 94, 95]
    times = [reading.at for reading in readings]
    assert times == sorted(times)
    assert times[4] - times[0] >= 0.02


def test_processes_are_asked_for_seldom_and_carried_along(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    monkeypatch.setattr("qlora_tui.gpu.metrics_sampler.PROCESSES_EVERY_S", 3600.0)
    samples: Samples = queue.SimpleQueue()
    with MetricsSampler(0, samples.put, period_s=0.01):
        readings = [take_reading(samples) for _ in range(5)]
    first_answer = GpuProcess(4242, (7 << 30) + (1 << 20))
    assert [reading.processes and reading.processes[0] for reading in readings] == [first_answer] * 5


def test_processes_are_asked_for_again_when_due(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    monkeypatch.setattr("qlora_tui.gpu.metrics_sampler.PROCESSES_EVERY_S", 0.0)
    samples: Samples = queue.SimpleQueue()
    with MetricsSampler(0, samples.put, period_s=0.01):
        readings = [take_reading(samples) for _ in range(2)]
    assert readings[0].processes != readings[1].processes


def test_a_gpu_lost_for_good_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "lost_later", lost_after=30)
    opened = threading.Semaphore(0)
    samples: Samples = queue.SimpleQueue()
    with MetricsSampler(0, samples.put, period_s=0.01, retry_s=0.01) as sampler:
        _count_openings(monkeypatch, opened)
        take_reading(samples)
        while isinstance(sample := samples.get(timeout=SOON_S), GpuMetrics):
            pass
        assert sample.reason is GpuUnavailableReason.LOST
        for _ in range(3):
            assert opened.acquire(timeout=SOON_S), "it does not try again"
        assert isinstance(sampler.latest, GpuUnavailableError)
    assert samples.empty()


def test_a_gpu_that_comes_back_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "recovers", lost_after=30)
    samples: Samples = queue.SimpleQueue()
    with MetricsSampler(0, samples.put, period_s=0.01, retry_s=0.01):
        take_reading(samples)
        while isinstance(sample := samples.get(timeout=SOON_S), GpuMetrics):
            pass
        assert sample.reason is GpuUnavailableReason.LOST
        assert take_reading(samples).memory_total_bytes == 24564 << 20


def test_a_missing_gpu_is_reported_once_until_it_appears(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_nvml_stub(monkeypatch, "not_loaded")
    samples: Samples = queue.SimpleQueue()
    with MetricsSampler(0, samples.put, period_s=0.01, retry_s=0.01):
        assert take_reason(samples) is GpuUnavailableReason.NOT_LOADED
        monkeypatch.setenv("NVML_STUB_SCENARIO", "one_gpu")
        assert take_reading(samples).utilization_percent == 91


def test_stopping_interrupts_the_wait_for_the_next_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    samples: Samples = queue.SimpleQueue()
    sampler = MetricsSampler(0, samples.put, period_s=3600)
    sampler.start()
    take_reading(samples)
    sampler.stop(timeout_s=60)
    sampler.stop()
    assert "gpu-sampler" not in [thread.name for thread in threading.enumerate()]


def test_the_one_who_gets_the_samples_may_stop_them(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    samples: Samples = queue.SimpleQueue()

    def take_one(sample: GpuMetrics | GpuUnavailableError) -> None:
        sampler.stop()
        samples.put(sample)

    sampler = MetricsSampler(0, take_one, period_s=0.01)
    sampler.start()
    take_reading(samples)
    sampler.stop()
    assert samples.empty()


def test_a_failing_receiver_is_logged_once_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    enough = threading.Event()
    calls = 0

    def fail(_sample: GpuMetrics | GpuUnavailableError) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            enough.set()
        raise OSError("no space left on device")

    with caplog.at_level(logging.ERROR), MetricsSampler(0, fail, period_s=0.01):
        assert enough.wait(SOON_S)
    assert len(caplog.records) == 1


def test_a_process_ends_without_stopping_its_sampler() -> None:
    code = """
import threading
from qlora_tui.gpu.metrics_sampler import MetricsSampler
got = threading.Event()
MetricsSampler(0, lambda sample: got.set()).start()
assert got.wait(20)
"""
    env = {**os.environ, **stub_env("one_gpu")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=env, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")


def _count_openings(patch: pytest.MonkeyPatch, opened: threading.Semaphore) -> None:
    import pynvml

    real = pynvml.nvmlInit

    def counted() -> None:
        opened.release()
        real()

    patch.setattr(pynvml, "nvmlInit", counted)
