from __future__ import annotations

import pytest

from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.recipe.fields import fields
from qlora_tui.runs.telemetry import Reading
from qlora_tui.tui.screens.train.machine_panel import MachineState, machine_lines
from qlora_tui.tui.setting_stepper import step_value
from tests.tui.fake_runs import GIB


def drawn(machine: MachineState, width: int = 30, height: int = 24) -> list[str]:
    return [line.plain for line in machine_lines(machine, width, height)]


def test_a_missing_gpu_value_is_na_and_never_zero() -> None:
    nothing = Reading(at=1.0, rss_bytes=GIB, cpu_percent=1.0, gpu=GpuMetrics(at=1.0, index=0))
    for height in (24, 2):
        text = "\n".join(drawn(MachineState("RTX 4090", (nothing,)), 80, height))
        assert text.count("NA") >= 5
        assert " 0" not in text.replace(" 0%", "")


def test_memory_is_a_bar_with_a_track_in_two_lines() -> None:
    gpu = GpuMetrics(at=1.0, index=0, memory_used_bytes=6 * GIB, memory_total_bytes=24 * GIB)
    line, _ = drawn(
        MachineState("RTX 4090", (Reading(at=1.0, rss_bytes=GIB, cpu_percent=1.0, gpu=gpu),)), 80, 2
    )
    assert "memory ▄▄▄▄▄▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁ 6.0 of 24.0 GiB" in line


def test_a_steady_reading_is_a_share_of_a_scale_whose_top_is_named() -> None:
    gpus = [
        GpuMetrics(at=at, index=0, utilization_percent=25, temperature_c=61, power_w=225, power_limit_w=450)
        for at in map(float, range(90))
    ]
    readings = tuple(Reading(at=gpu.at, rss_bytes=GIB, cpu_percent=1.0, gpu=gpu) for gpu in gpus)
    texts = drawn(MachineState("RTX 4090", readings), 60, 24)
    for name, top, columns in (("util", "100%", " ▄"), ("power", "", " █"), ("temp", "100 °C", "▁█")):
        at = next(number for number, text in enumerate(texts) if text.startswith(name))
        assert [texts[at - 1][20], texts[at][20]] == list(columns)
        assert texts[at - 1].endswith(top)


def test_power_without_a_limit_is_drawn_by_the_highest_reading_and_not_as_a_share() -> None:
    powers = [GpuMetrics(at=float(at), index=0, power_w=watts) for at, watts in enumerate((200.0, 50.0))]
    readings = tuple(Reading(at=each.at, rss_bytes=GIB, cpu_percent=1.0, gpu=each) for each in powers)
    machine = MachineState("RTX 4090", readings)
    (power,) = (line for line in drawn(machine, 80, 24) if line.startswith("power"))
    assert power.split(" 50 W")[0][-2:] == "█▄"
    (power,) = (line for line in drawn(machine, 80, 8) if line.startswith("power"))
    assert "▄" not in power


@pytest.mark.parametrize(("height", "lines"), [(24, 16), (8, 8), (4, 4), (2, 2)])
def test_every_gpu_of_a_run_has_its_lines(height: int, lines: int) -> None:
    first, second = (GpuMetrics(at=1.0, index=i, power_w=100.0 + i) for i in range(2))
    reading = Reading(at=1.0, rss_bytes=GIB, cpu_percent=1.0, gpu=first, other_gpus=(second,))
    names = {0: "GPU 0 (RTX 4090)", 1: "GPU 1 (RTX 3060)"}
    text = drawn(MachineState("2 GPUs", (reading,), names), 80, height)
    assert len(text) == lines
    assert [line.split(")")[0] + ")" for line in text if line.startswith("GPU")] == list(names.values())
    for watts in ("100", "101"):
        assert sum(f"{watts} of" in line or f"{watts} W" in line for line in text) == 1


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
