"""What is noticed, once, and what is not."""

from __future__ import annotations

import math

import pytest

from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.training.health import (
    GpuMonitor,
    OverflowMonitor,
    StepMonitor,
    ValidationMonitor,
    find_non_finite,
    too_few_steps,
)


def kinds(losses: list[float], norms: list[float]) -> list[tuple[int, str]]:
    watch = StepMonitor()
    return [
        (step, finding.kind)
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
        for finding in watch.check(step, loss, norm)
    ]


def test_an_exploding_gradient_is_reported_once() -> None:
    assert kinds([2.0] * 30, [1.0] * 25 + [50.0, 60.0] + [1.0] * 3) == [(26, "exploding_gradient")]


def test_large_gradients_at_the_start_are_not_odd() -> None:
    assert kinds([2.0] * 10, [500.0, *[1.0] * 9]) == []


@pytest.mark.parametrize(
    ("loss", "norm", "norm_may_overflow", "evidence"),
    [
        (math.nan, 1.0, False, "The loss is nan at step 7."),
        (math.inf, math.nan, True, "The loss is inf at step 7."),
        (2.0, math.inf, False, "The gradient norm is inf at step 7."),
        (2.0, math.inf, True, ""),
        (2.0, 1.0, False, ""),
    ],
)
def test_the_finding_names_the_value_that_is_not_finite(
    loss: float, norm: float, norm_may_overflow: bool, evidence: str
) -> None:
    finding = find_non_finite(7, loss, norm, norm_may_overflow=norm_may_overflow)
    assert (finding.evidence if finding else "") == evidence


def test_only_steps_skipped_in_a_row_are_too_many() -> None:
    monitor = OverflowMonitor()
    skipped = [*[True] * 11, False, *[True] * 12]
    findings = [monitor.check(step, is_skipped=is_skipped) for step, is_skipped in enumerate(skipped, 1)]
    assert [finding is not None for finding in findings] == [*[False] * 23, True]
    assert findings[-1] is not None and "12 consecutive steps, up to step 24" in findings[-1].evidence


def test_a_loss_of_exactly_zero_is_told() -> None:
    assert kinds([1.0, 0.0], [1.0, 0.0]) == [(2, "zero_loss")]


def test_a_loss_that_no_longer_falls_is_told() -> None:
    falling = [3.0 - step / 200 for step in range(200)]
    assert kinds(falling, [1.0] * 200) == []
    assert kinds([2.0] * 200, [1.0] * 200) == [(200, "plateau")]


@pytest.mark.parametrize(("steps", "odd"), [(1, True), (9, True), (10, False)])
def test_a_run_of_few_steps_is_told(steps: int, odd: bool) -> None:
    assert (too_few_steps(steps) is not None) is odd


def test_a_validation_worse_than_before_training_is_reported_once() -> None:
    monitor = ValidationMonitor()
    losses = [(0, 4.36), (2, 4.5), (4, 16.1), (6, 9.38), (8, 4.0), (10, float("nan"))]
    findings = [(step, monitor.check(step, loss, 4.36)) for step, loss in losses]
    assert [step for step, finding in findings if finding is not None] == [4, 10]
    evidence = findings[2][1]
    assert evidence is not None
    assert evidence.evidence == "The validation loss is 16.1 at step 4; before training it was 4.36."


def test_an_idle_gpu_holding_memory_is_reported_once() -> None:
    watch = GpuMonitor()
    idle = [finding for at in range(200) for finding in watch.check(busy(0), at)]
    assert [finding.kind for finding in idle] == ["gpu_idle"]
    assert watch.check(busy(90), 200) == []
    assert [f.kind for at in range(201, 300) for f in watch.check(busy(0), at)] == ["gpu_idle"]


def test_a_clock_that_is_set_makes_no_gpu_idle() -> None:
    watch = GpuMonitor()
    findings = [watch.check(busy(0, at=at), now) for now, at in enumerate([100.0, 101.0, 7300.0, 50.0])]
    assert findings == [[], [], [], []]


def busy(percent: int, at: float = 0.0) -> GpuMetrics:
    return GpuMetrics(at=at, index=0, utilization_percent=percent, memory_used_bytes=4 << 30)


def test_heat_is_told_and_a_power_cap_is_not() -> None:
    def kinds(reason: str) -> list[str]:
        watch = GpuMonitor()
        return [
            finding.kind
            for at in range(1, 100)
            for finding in watch.check(GpuMetrics(at=at, index=0, throttle=(reason,), temperature_c=91), at)
        ]

    assert kinds("thermal") == ["throttled"]
    assert kinds("power cap") == []


def test_a_gpu_that_says_nothing_shows_nothing() -> None:
    watch = GpuMonitor()
    assert [f for at in range(200) for f in watch.check(GpuMetrics(at=at, index=0), at)] == []
