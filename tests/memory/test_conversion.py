"""What converting a GGUF file takes, beside what was measured."""

from __future__ import annotations

import pytest

from qlora_tui.memory.levels import Conversion, Way, peak_bytes

MIB = 2**20


@pytest.mark.parametrize(
    ("way", "file_bytes", "vocabulary", "measured_mib"),
    [("plain", 98_362_432, 49_152, 329), ("streamed", 253_113_024, 262_144, 995)],
)
def test_the_formula_is_within_a_tenth_of_what_was_measured(
    way: Way, file_bytes: int, vocabulary: int, measured_mib: int
) -> None:
    estimated = peak_bytes(way, file_bytes=file_bytes, vocabulary=vocabulary)
    assert estimated / MIB == pytest.approx(measured_mib, rel=0.1)


def test_a_conversion_is_compared_with_a_run_on_the_cpu() -> None:
    conversion = Conversion("tiny.gguf", 900 * MIB)
    assert conversion.words(800 * MIB).endswith("900 MiB, more than the run.")
    assert conversion.words(1000 * MIB).endswith("900 MiB, less than the run.")
    assert conversion.words(None).endswith("900 MiB, of the machine's memory.")
