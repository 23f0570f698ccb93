"""Exact estimates: traced by a child with limits, and kept."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_tui import paths
from qlora_tui.data.confined import Confined
from qlora_tui.errors import UserError
from qlora_tui.memory import Device, trainer_execution
from qlora_tui.memory.recording import StepTrace
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import exact_memory
from qlora_tui.runs.exact_memory import TraceRequest, TraceStopped, stored_trace, trace_soon, trace_step
from tests.memory.models import traced_peaks

CONFIG = {"model_type": "llama"}
RECIPE = Recipe()
EXECUTION = trainer_execution(RECIPE, Device())


@pytest.fixture
def traced(private_home: Path, monkeypatch: pytest.MonkeyPatch) -> list[TraceRequest]:
    """Requests that reached a child, which answers at once."""
    requests: list[TraceRequest] = []

    def trace(request: TraceRequest) -> StepTrace:
        requests.append(request)
        return traced_peaks(1 << 30, 2 << 30)

    monkeypatch.setattr(exact_memory, "_trace", trace)
    return requests


def test_a_step_is_traced_once(traced: list[TraceRequest]) -> None:
    assert stored_trace(CONFIG, RECIPE, EXECUTION) is None
    first = trace_step(CONFIG, RECIPE, EXECUTION)
    assert trace_step(CONFIG, RECIPE, EXECUTION) == stored_trace(CONFIG, RECIPE, EXECUTION) == first
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("path", "value", "is_another"),
    [
        ("training.learning_rate", 1e-5, False),
        ("lora.alpha", 8.0, False),
        ("data.train_on", "all", False),
        ("training.gradient_accumulation", 64, False),
        ("lora.rank", 8, True),
        ("data.max_length", 512, True),
        ("quantization.method", "int8", True),
        ("training.gradient_accumulation", 1, True),
    ],
)
def test_only_what_changes_memory_is_traced_again(
    traced: list[TraceRequest], path: str, value: object, is_another: bool
) -> None:
    trace_step(CONFIG, RECIPE, EXECUTION)
    recipe = replace_setting(RECIPE, path, value)
    trace_step(CONFIG, recipe, trainer_execution(recipe, Device()))
    assert len(traced) == (2 if is_another else 1)


def test_another_config_or_version_is_traced_again(
    traced: list[TraceRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_step(CONFIG, RECIPE, EXECUTION)
    assert stored_trace(CONFIG | {"hidden_size": 64}, RECIPE, EXECUTION) is None
    monkeypatch.setattr(exact_memory, "_versions", lambda: ("9.9",))
    assert stored_trace(CONFIG, RECIPE, EXECUTION) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"transformers": 1}'])
def test_a_damaged_trace_is_made_again(traced: list[TraceRequest], content: bytes) -> None:
    trace_step(CONFIG, RECIPE, EXECUTION)
    (file,) = (paths.cache_dir() / exact_memory.KIND).iterdir()
    file.write_bytes(content)
    assert trace_step(CONFIG, RECIPE, EXECUTION) and len(traced) == 2


def test_the_oldest_traces_are_deleted(traced: list[TraceRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_memory, "MAX_FILES", 2)
    for rank in (1, 2, 4):
        trace_step(CONFIG, replace_setting(RECIPE, "lora.rank", rank), EXECUTION)
        for number, file in enumerate(sorted((paths.cache_dir() / exact_memory.KIND).iterdir())):
            os.utime(file, (number, file.stat().st_mtime - 1))
    assert len(list((paths.cache_dir() / exact_memory.KIND).iterdir())) == 2


def test_a_trace_that_nobody_waits_for_is_not_begun(traced: list[TraceRequest]) -> None:
    with pytest.raises(TraceStopped):
        trace_step(CONFIG, RECIPE, EXECUTION, lambda: True)
    assert not traced


def test_a_launch_waits_only_so_long(traced: list[TraceRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    assert trace_soon(CONFIG, RECIPE, EXECUTION, 0.0) is None and not traced
    assert trace_soon(CONFIG, RECIPE, EXECUTION, 20.0) is not None

    def refuse(*args: object) -> StepTrace:
        raise UserError("The step could not be traced", what="It is refused.")

    monkeypatch.setattr(exact_memory, "_trace", refuse)
    assert trace_soon(CONFIG | {"hidden_size": 64}, RECIPE, EXECUTION, 20.0) is None


def _spin(request: TraceRequest) -> StepTrace:
    while True:
        time.monotonic()


def _fill(request: TraceRequest) -> StepTrace:
    held = [bytes(64 << 20) for _ in range(1000)]
    raise AssertionError(len(held))


@pytest.fixture
def small_child(private_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    child = Confined("qlora_tui.runs.exact_memory", cpu_s=0.5, memory_bytes=256 << 20)
    monkeypatch.setattr(exact_memory, "_child", child)
    yield
    child.close()


@pytest.mark.parametrize("work", [_spin, _fill])
@pytest.mark.usefixtures("small_child")
def test_a_model_without_end_is_refused(work: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_memory, "_in_child", work)
    with pytest.raises(UserError) as refused:
        trace_step(CONFIG, RECIPE, EXECUTION)
    assert refused.value.title == "The step could not be traced" and refused.value.why
