"""What past runs measured corrects the next estimate."""

from __future__ import annotations

import pytest
from msgspec import structs

from qlora_tui.memory import Device, Estimate, MeasuredRun, correction_for, estimate, record_run
from qlora_tui.memory.calibration import record_file
from qlora_tui.memory.levels import RUNTIME_BYTES, peak_bytes
from qlora_tui.recipe.schema import Recipe
from tests.memory.models import qwen_7b, tinyllama

pytestmark = pytest.mark.slow

MIB = 2**20
GIB = 2**30
GPU = "NVIDIA GeForce RTX 4090"


def _run(factor: float, outside: int = 300 * MIB, machine: str = GPU, managed: int = 0) -> MeasuredRun:
    """A run on a GPU whose allocator took ``factor`` of what was predicted."""
    return MeasuredRun(
        at=0.0,
        machine=machine,
        managed_bytes=managed,
        predicted_allocated_bytes=9 * GIB,
        predicted_reserved_bytes=10 * GIB,
        predicted_process_bytes=10 * GIB + 141 * MIB + managed,
        measured_reserved_bytes=int(10 * GIB * factor),
        measured_process_bytes=int(10 * GIB * factor) + outside + managed,
    )


def _cpu_run(process: int) -> MeasuredRun:
    return MeasuredRun(
        at=0.0,
        machine="a CPU",
        own_process=True,
        counts_gaps=True,
        predicted_allocated_bytes=100 * MIB,
        predicted_reserved_bytes=120 * MIB,
        predicted_process_bytes=600 * MIB,
        measured_process_bytes=process,
    )


def _corrected_estimate(machine: str = GPU) -> Estimate:
    return estimate(Recipe(), qwen_7b(), device=Device(correction=correction_for(machine)))


def test_one_run_corrects_nothing_and_is_counted() -> None:
    record_run(_run(1.2))
    estimated = _corrected_estimate()
    assert (
        estimated.process_bytes == estimate(Recipe(), qwen_7b()).process_bytes == estimated.uncorrected_bytes
    )
    assert estimated.correction_words == "1 run measured, 2 are needed for a correction"


def test_tensors_are_scaled_and_the_context_is_taken_as_measured() -> None:
    for factor, outside in ((1.02, 290), (1.1, 300), (1.04, 500)):
        record_run(_run(factor, outside * MIB))
    record_run(_run(1.4, machine="another GPU"))
    correction = correction_for(GPU)
    assert correction is not None and correction.runs == 3
    assert (round(correction.factor, 3), correction.outside_bytes) == (1.04, 300 * MIB)
    assert correction.low < 1 < correction.high
    raw, corrected = estimate(Recipe(), qwen_7b()), _corrected_estimate()
    assert corrected.bytes_of("context") == 300 * MIB
    assert corrected.allocated_bytes == raw.allocated_bytes
    assert corrected.reserved_bytes == int(raw.reserved_bytes * correction.factor)


def test_a_corrected_estimate_says_so_and_still_adds_up() -> None:
    for factor in (1.05, 0.98, 0.5):
        record_file().unlink(missing_ok=True)
        record_run(_run(factor))
        record_run(_run(factor))
        corrected = _corrected_estimate()
        assert sum(item.bytes for item in corrected.items) == corrected.process_bytes
        assert all(item.bytes > 0 for item in corrected.items)
        assert corrected.allocated_bytes <= corrected.reserved_bytes <= corrected.process_bytes
        assert corrected.band.low_bytes <= corrected.process_bytes <= corrected.band.high_bytes
        change = corrected.process_bytes / corrected.uncorrected_bytes - 1
        assert corrected.correction_words == f"corrected {change * 100:+.0f}% from 2 runs"


def test_a_tiny_cpu_run_does_not_distort_a_large_one() -> None:
    record_run(_cpu_run(700 * MIB))
    record_run(_cpu_run(700 * MIB))
    device = Device(kind="cpu", correction=correction_for("a CPU"))
    for model in (tinyllama(), qwen_7b()):
        raw, corrected = (
            estimate(Recipe(), model, device=Device(kind="cpu")),
            estimate(Recipe(), model, device=device),
        )
        assert corrected.bytes_of("runtime") == 580 * MIB
        assert corrected.process_bytes - raw.process_bytes == 580 * MIB - RUNTIME_BYTES


@pytest.mark.parametrize("earlier", ["own_process", "counts_gaps"])
def test_a_cpu_run_of_an_earlier_version_is_not_learned(earlier: str) -> None:
    for _ in range(3):
        record_run(structs.replace(_cpu_run(1600 * MIB), **{earlier: False}))
    assert correction_for("a CPU") is None
    record_run(_cpu_run(700 * MIB))
    record_run(_cpu_run(700 * MIB))
    correction = correction_for("a CPU")
    assert correction is not None and (correction.runs, correction.outside_bytes) == (2, 580 * MIB)


def test_a_gpu_run_is_learned_whoever_converted_its_file() -> None:
    assert not _run(1.0).own_process
    record_run(_run(1.0))
    record_run(_run(1.0))
    correction = correction_for(GPU)
    assert correction is not None and correction.runs == 2


def test_a_large_vocabularys_memory_is_not_learned_for_small_ones() -> None:
    cpu = Device(kind="cpu")
    large, small = (estimate(Recipe(), model, device=cpu) for model in (qwen_7b(), tinyllama()))
    for _ in range(2):
        record_run(
            structs.replace(
                _cpu_run(large.process_bytes + 10 * MIB),
                predicted_allocated_bytes=large.allocated_bytes,
                predicted_reserved_bytes=large.reserved_bytes,
                predicted_process_bytes=large.process_bytes,
            )
        )
    corrected = estimate(Recipe(), tinyllama(), device=Device(kind="cpu", correction=correction_for("a CPU")))
    assert corrected.process_bytes == small.process_bytes + 10 * MIB
    assert corrected.bytes_of("tokenizer") == small.bytes_of("tokenizer") > 0


def test_a_paged_optimizers_states_are_not_taken_for_the_context() -> None:
    record_run(_run(1.0, 200 * MIB))
    record_run(_run(1.0, 5 * GIB, managed=GIB))
    record_run(_run(1.0, 5 * GIB, managed=GIB))
    correction = correction_for(GPU)
    assert correction is not None and correction.outside_bytes == 200 * MIB


def test_a_torn_line_is_passed_over() -> None:
    record_run(_run(1.0))
    with record_file().open("ab") as file:
        file.write(b'{"at": 1.0, "mach')
    record_run(_run(1.0))
    correction = correction_for(GPU)
    assert correction is not None and correction.runs == 2


@pytest.mark.parametrize(
    ("file_bytes", "vocabulary", "measured_mib"),
    [(98_362_432, 49_152, 472), (253_113_024, 262_144, 805)],
)
def test_the_formula_is_within_a_tenth_of_what_was_measured(
    file_bytes: int, vocabulary: int, measured_mib: int
) -> None:
    estimated = peak_bytes(file_bytes=file_bytes, vocabulary=vocabulary)
    assert estimated / MIB == pytest.approx(measured_mib, rel=0.1)
