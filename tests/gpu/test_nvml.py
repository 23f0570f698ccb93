"""The driver behind the real binding, in child processes that load the stub as their driver.

The facts travel as JSON, and what a GPU does not say stays unsaid.

The thread that reads the GPU: it is regular, survives a lost GPU, and stops on request.

Having no GPU is an answer with sentences in it.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qlora_tui.gpu import nvml
from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason, from_nvml_error
from qlora_tui.gpu.metrics import GpuDevice, GpuMetrics, GpuProcess
from qlora_tui.gpu.nvml import MetricsSampler, Nvml, describe_throttle, list_gpus
from tests.support.nvml_stub import install_nvml_stub, stub_env

REPOSITORY = Path(__file__).parents[2]
MIB = 1 << 20
GIB = 1 << 30

READ = """
import msgspec
from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.nvml import list_gpus
from qlora_tui.gpu.nvml import Nvml
out = {"gpus": [], "readings": [], "no_gpu": None}
try:
    out["gpus"] = list_gpus()
    with Nvml() as nvml:
        for _ in range(3):
            for gpu in out["gpus"]:
                out["readings"].append(nvml.read(gpu.index, processes=True))
except GpuUnavailableError as no_gpu:
    out["no_gpu"] = [no_gpu.reason, no_gpu.what, no_gpu.why, no_gpu.fix]
print(msgspec.json.encode(out).decode())
"""


class Seen(msgspec.Struct):
    """What a child process saw of the machine."""

    gpus: list[GpuDevice]
    readings: list[GpuMetrics]
    no_gpu: tuple[GpuUnavailableReason, str, str, str] | None


def run_child(code: str, env: dict[str, str]) -> Any:
    """The last line ``code`` prints, as JSON; it must end well and say nothing on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout.splitlines()[-1])


def look(scenario: str) -> Seen:
    return msgspec.convert(run_child(READ, stub_env(scenario)), Seen)


def test_a_gpu_tells_everything() -> None:
    seen = look("one_gpu")
    assert seen.no_gpu is None
    assert seen.gpus == [
        GpuDevice(
            index=0,
            name="NVIDIA GeForce RTX 4090",
            uuid="GPU-40900001-1111-2222-3333-444455556666",
            total_bytes=24564 * MIB,
            compute_capability="8.9",
            driver="550.54.14",
            reserved_bytes=430 * MIB,
            cuda_version="12.4",
            compute_mode="shared",
            cores=16384,
        )
    ]
    assert seen.gpus[0].multiprocessors == 128
    first = msgspec.structs.replace(seen.readings[0], at=0.0)
    assert first == GpuMetrics(
        at=0.0,
        index=0,
        utilization_percent=91,
        memory_used_bytes=8 * GIB + 64 * MIB,
        memory_total_bytes=24564 * MIB,
        power_w=316.0,
        power_limit_w=450.0,
        temperature_c=61,
        sm_clock_mhz=2535,
        fan_percent=41,
        throttle=(),
        processes=(
            GpuProcess(4242, 7 * GIB + MIB),
            GpuProcess(1001, 350 * MIB, computes=False),
            GpuProcess(5151, 90 * MIB),
        ),
    )


def test_two_gpus_are_told_apart_and_one_may_say_less() -> None:
    seen = look("two_gpus")
    assert [gpu.short_name for gpu in seen.gpus] == ["RTX 4090", "RTX 3060"]
    quiet = next(reading for reading in seen.readings if reading.index == 1)
    assert quiet.memory_total_bytes == 12288 * MIB
    assert quiet.utilization_percent == 91
    assert (quiet.fan_percent, quiet.power_limit_w, quiet.throttle) == (None, None, None)


def test_not_supported_everywhere_is_a_gpu_that_says_nothing() -> None:
    seen = look("unsupported")
    assert seen.no_gpu is None
    assert seen.gpus == [GpuDevice(0, "GPU 0", None, None, None, None)]
    assert all(reading == GpuMetrics(at=reading.at, index=0) for reading in seen.readings)


def test_an_idle_gpu_reads_zero_and_is_not_throttled() -> None:
    reading = look("idle").readings[0]
    assert (reading.utilization_percent, reading.fan_percent, reading.memory_used_bytes) == (0, 0, 0)
    assert (reading.throttle, reading.processes) == ((), ())


def test_a_hot_gpu_says_what_holds_it_back() -> None:
    assert look("hot").readings[0].throttle == ("power cap", "thermal")


def test_an_old_driver_is_asked_in_the_old_way() -> None:
    """Memory counts the reserve as used there, and process lists are missing."""
    seen = look("old_driver")
    reading = seen.readings[0]
    assert (seen.gpus[0].reserved_bytes, seen.gpus[0].multiprocessors) == (None, None)
    assert reading.memory_used_bytes == (8 * 1024 + 64 + 430) * MIB
    assert (reading.throttle, reading.processes) == ((), None)


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("no_driver", GpuUnavailableReason.NO_DRIVER),
        ("not_loaded", GpuUnavailableReason.NOT_LOADED),
        ("mismatch", GpuUnavailableReason.MISMATCH),
        ("no_permission", GpuUnavailableReason.NO_PERMISSION),
        ("no_device", GpuUnavailableReason.NO_DEVICE),
        ("lost", GpuUnavailableReason.LOST),
        ("broken", GpuUnavailableReason.OTHER),
    ],
)
def test_each_way_to_have_no_gpu_has_its_own_sentences(
    scenario: str, reason: GpuUnavailableReason, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvml_stub(monkeypatch, scenario)
    with pytest.raises(GpuUnavailableError) as caught:
        list_gpus()
    error = caught.value
    assert error.reason is reason
    assert error.what and error.why and error.fix
    if reason is GpuUnavailableReason.OTHER:
        assert error.why == "NVML says: Unknown Error."


def test_a_driver_without_a_card_is_no_broken_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "not_loaded")
    monkeypatch.setattr(nvml, "_PCI_DEVICES", tmp_path)
    for vendor, reason in (
        ("0x8086", GpuUnavailableReason.NO_DEVICE),
        ("0x10de", GpuUnavailableReason.NOT_LOADED),
    ):
        (tmp_path / vendor).mkdir()
        (tmp_path / vendor / "vendor").write_text(f"{vendor}\n")
        assert _reason(list_gpus) is reason


def test_a_container_without_nvml_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "no_driver")
    monkeypatch.setattr(nvml, "_CONTROL_DEVICE", tmp_path)
    assert _reason(list_gpus) is GpuUnavailableReason.NO_LIBRARY


def test_a_gpu_lost_between_two_readings_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "lost_later", lost_after=14)
    with Nvml() as nvml:
        assert nvml.read(0).utilization_percent == 91
        assert _reason(lambda: nvml.read(0)) is GpuUnavailableReason.LOST
    assert _reason(list_gpus) is GpuUnavailableReason.LOST


def test_an_index_the_driver_does_not_know_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    with Nvml() as nvml:
        assert _reason(lambda: nvml.read(3)) is GpuUnavailableReason.NO_DEVICE


def test_closing_twice_and_opening_twice_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    with Nvml() as outer:
        with Nvml() as inner:
            inner.read(0)
        inner.close()
        assert outer.read(0).utilization_percent == 92


def test_processes_are_asked_for_only_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    with Nvml() as nvml:
        assert nvml.read(0).processes is None
        assert nvml.read(0, processes=True).processes is not None


def _reason(ask: Callable[[], object]) -> GpuUnavailableReason:
    with pytest.raises(GpuUnavailableError) as caught:
        ask()
    return caught.value.reason


def test_a_missing_value_is_omitted_and_decoded_as_none() -> None:
    line = msgspec.json.encode(GpuMetrics(at=1.0, index=0))
    assert line == b'{"at":1.0,"index":0}'
    assert msgspec.json.decode(line, type=GpuMetrics).memory_used_bytes is None


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3"),
        ("Tesla T4", "Tesla T4"),
    ],
)
def test_the_short_name_leaves_the_maker_out(name: str, short: str) -> None:
    assert GpuDevice(0, name, None, None, None, None).short_name == short


@pytest.mark.parametrize(
    ("total", "reserved", "usable"), [(24564, 430, 24134), (24564, None, 24564), (None, None, None)]
)
def test_programs_cannot_have_what_the_driver_reserves(
    total: int | None, reserved: int | None, usable: int | None
) -> None:
    assert GpuDevice(0, "T4", None, total, None, None, reserved).usable_bytes == usable


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0, ()),
        (0x1, ()),
        (0x2 | 0x100, ()),
        (0x4, ("power cap",)),
        (0x20 | 0x40, ("thermal",)),
        (0x8, ("hardware slowdown",)),
        (0x8 | 0x40, ("thermal",)),
        (0x8 | 0x80, ("power brake",)),
        (0x1 << 40, ()),
    ],
)
def test_throttle_reasons_in_words(bits: int, words: tuple[str, ...]) -> None:
    assert describe_throttle(bits) == words


def test_cores_say_how_many_multiprocessors_there_are() -> None:
    chips = {(5888, "8.6"): 46, (6912, "8.0"): 108, (2560, "7.5"): 40, (None, "8.9"): None, (16, None): None}
    for (cores, capability), multiprocessors in chips.items():
        gpu = GpuDevice(0, "GPU", None, None, capability, None, cores=cores)
        assert gpu.multiprocessors == multiprocessors


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
    monkeypatch.setattr("qlora_tui.gpu.nvml.PROCESSES_EVERY_S", 3600.0)
    samples: Samples = queue.SimpleQueue()
    with MetricsSampler(0, samples.put, period_s=0.01):
        readings = [take_reading(samples) for _ in range(5)]
    first_answer = GpuProcess(4242, (7 << 30) + (1 << 20))
    assert [reading.processes and reading.processes[0] for reading in readings] == [first_answer] * 5


def test_processes_are_asked_for_again_when_due(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    monkeypatch.setattr("qlora_tui.gpu.nvml.PROCESSES_EVERY_S", 0.0)
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
from qlora_tui.gpu.nvml import MetricsSampler
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


def test_an_unknown_nvml_error_shows_nvmls_own_text() -> None:
    assert from_nvml_error(999, "Unknown Error").why == "NVML says: Unknown Error."


def test_it_crosses_a_process_border_whole() -> None:
    copy = pickle.loads(pickle.dumps(GpuUnavailableError(GpuUnavailableReason.HIDDEN, "It is empty.")))
    assert (copy.reason, copy.why) == (GpuUnavailableReason.HIDDEN, "It is empty.")
