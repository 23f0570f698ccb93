"""What past runs measured corrects the next estimate."""

from __future__ import annotations

from qlora_tui.memory import Estimate, Peaks, corrected, correction_for, estimate, remember
from qlora_tui.memory.learning import record_file
from qlora_tui.recipe.schema import Recipe
from tests.memory.models import qwen_7b


def _run(ratio: float, machine: str = "RTX 4090") -> Peaks:
    return Peaks(
        at=0.0,
        machine=machine,
        predicted_allocated_bytes=900,
        predicted_reserved_bytes=950,
        predicted_process_bytes=1000,
        measured_process_bytes=int(1000 * ratio),
    )


def _made() -> Estimate:
    return estimate(Recipe(), qwen_7b())


def test_one_run_corrects_nothing() -> None:
    remember(_run(1.2))
    assert correction_for("RTX 4090") is None
    assert corrected(_made(), None) == _made()


def test_the_median_of_this_machines_runs_is_the_correction() -> None:
    for ratio in (1.02, 1.1, 1.04):
        remember(_run(ratio))
    remember(_run(1.4, machine="another card"))
    found = correction_for("RTX 4090")
    assert found is not None
    assert (found.factor, found.runs, found.low, found.high) == (1.04, 3, 1.02, 1.1)


def test_a_corrected_estimate_says_so_and_still_adds_up() -> None:
    for factor in (1.05, 0.98, 0.9):
        record_file().unlink(missing_ok=True)
        remember(_run(factor))
        remember(_run(factor))
        made = corrected(_made(), correction_for("RTX 4090"))
        assert sum(item.bytes for item in made.items) == made.process_bytes
        assert all(item.bytes > 0 for item in made.items)
        assert made.allocated_bytes <= made.reserved_bytes <= made.process_bytes
        assert "from 2 runs here" in made.notes[-1]
        assert made.band.low_bytes <= made.process_bytes or factor == 0.9


def test_a_torn_line_is_passed_over() -> None:
    remember(_run(1.0))
    with record_file().open("ab") as file:
        file.write(b'{"at": 1.0, "mach')
    remember(_run(1.0))
    remember(_run(1.0))
    assert correction_for("RTX 4090") is not None
