"""The facts travel as JSON, and what a GPU does not say stays unsaid."""

from __future__ import annotations

import msgspec
import pytest

from qlora_tui.gpu.metrics import GpuDevice, GpuMetrics, GpuProcess
from qlora_tui.gpu.nvml import describe_throttle


def test_a_reading_survives_json() -> None:
    reading = GpuMetrics(
        at=1764000000.25,
        index=1,
        utilization_percent=0,
        power_w=21.5,
        throttle=("power cap", "thermal"),
        processes=(GpuProcess(4242, 7 << 30), GpuProcess(5151)),
    )
    assert msgspec.json.decode(msgspec.json.encode(reading), type=GpuMetrics) == reading


def test_a_missing_value_is_omitted_and_decoded_as_none() -> None:
    line = msgspec.json.encode(GpuMetrics(at=1.0, index=0))
    assert line == b'{"at":1.0,"index":0}'
    assert msgspec.json.decode(line, type=GpuMetrics).memory_used_bytes is None


def test_not_throttled_and_not_said_are_told_apart_in_json() -> None:
    line = msgspec.json.encode(GpuMetrics(at=1.0, index=0, throttle=()))
    assert msgspec.json.decode(line, type=GpuMetrics).throttle == ()


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
