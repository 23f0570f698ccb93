"""The driver behind the real binding, in child processes that load the stub as their driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qlora_tui.gpu import nvml
from qlora_tui.gpu.driver import list_gpus
from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.gpu.metrics import GpuDevice, GpuMetrics, GpuProcess
from qlora_tui.gpu.nvml import Nvml
from tests.support.nvml_stub import install_nvml_stub, stub_env

REPOSITORY = Path(__file__).parents[2]
MIB = 1 << 20
GIB = 1 << 30

READ = """
import msgspec
from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.driver import list_gpus
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
        memory_clock_mhz=10501,
        fan_percent=41,
        throttle=(),
        processes=(
            GpuProcess(4242, 7 * GIB + MIB),
            GpuProcess(1001, 350 * MIB, computes=False),
            GpuProcess(5151, 90 * MIB),
        ),
    )


def test_values_move_from_reading_to_reading() -> None:
    readings = look("one_gpu").readings
    assert [reading.utilization_percent for reading in readings] == [91, 92, 93]
    assert [reading.temperature_c for reading in readings] == [61, 62, 63]


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


def test_importing_the_room_loads_neither_driver_binding_nor_numpy() -> None:
    code = """
import json, sys
import qlora_tui.gpu.metrics_sampler, qlora_tui.gpu.visible_devices
print(json.dumps(sorted({"pynvml", "ctypes", "numpy", "torch"} & set(sys.modules))))
"""
    assert run_child(code, {}) == []


def _reason(ask: Callable[[], object]) -> GpuUnavailableReason:
    with pytest.raises(GpuUnavailableError) as caught:
        ask()
    return caught.value.reason
