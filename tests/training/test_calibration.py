"""Calibrated probabilities of decisions, and that nothing is judged by the rows it was fitted on."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from qlora_tui.data.decisions import Decision
from qlora_tui.runs.task_metrics.decisions import (
    MIN_FITTED_ROWS,
    Calibration,
    DecisionReport,
    Threshold,
    decision_lines,
    threshold_sentence,
)
from qlora_tui.training import calibration
from qlora_tui.training.calibration import calibrate, calibration_error

pytestmark = pytest.mark.slow

LABELS = Decision(options=("a", "b", "c"))


def decided(rows: int, *, sharpness: float, bias: float = 0.0, seed: int = 0) -> tuple[Tensor, list[int]]:
    """Scores that are ``sharpness`` times as sure as they should be, and too fond of ``a`` by ``bias``."""
    draw = torch.Generator().manual_seed(seed)
    honest = (2 * torch.randn(rows, 3, generator=draw, dtype=torch.float64)).log_softmax(-1)
    truth = torch.multinomial(honest.exp(), 1, generator=draw)[:, 0]
    return sharpness * honest + torch.tensor([bias, 0.0, 0.0]), truth.tolist()


def judged(scores: Tensor, truth: list[int]) -> DecisionReport:
    return calibrate(LABELS, scores.tolist(), scores.tolist(), truth)[0]


def test_a_temperature_makes_an_overconfident_model_honest() -> None:
    report = judged(*decided(800, sharpness=3.0, seed=1))
    assert report.calibration.temperature == pytest.approx(3.0, rel=0.15)
    assert not report.calibration.bias and report.calibration.rows == 800
    assert 2 * report.after.calibration_error.value < report.before.calibration_error.value
    sure, honest = (each.calibration_error.interval for each in (report.before, report.after))
    assert sure is not None and honest is not None and sure.low > 0.1 and honest.low == 0 < honest.high
    assert report.after.honest_error == pytest.approx(report.after.calibration_error.value, abs=0.02)
    before, after = (each.log_loss.interval for each in (report.before, report.after))
    assert before is not None and after is not None and after.high < before.low
    assert report.after.accuracy == report.before.accuracy
    lines = "\n".join(decision_lines(report))
    assert (
        "temperature of 3." in lines and "Let the model decide above 0." in lines and "to a person" in lines
    )


def test_a_bias_is_kept_where_it_helps_rows_it_has_not_seen() -> None:
    scores, truth = decided(400, sharpness=1.0, bias=3.0)
    report = judged(scores, truth)
    assert report.calibration.bias[0] < min(report.calibration.bias[1:]) - 2
    assert report.after.accuracy.value > report.before.accuracy.value + 0.1
    wanted = torch.tensor(truth)
    kept = torch.tensor([report.calibration.probabilities(row) for row in scores.tolist()])
    assert kept.sum(1).tolist() == pytest.approx([1.0] * 400)
    assert float((kept.argmax(1) == wanted).double().mean()) == pytest.approx(
        report.after.accuracy.value, abs=0.03
    )


def test_few_rows_are_not_fitted_and_right_ones_make_nothing_certain() -> None:
    few = judged(*decided(MIN_FITTED_ROWS - 1, sharpness=3.0))
    assert few.calibration == Calibration() and "too few to calibrate" in next(iter(decision_lines(few)))
    truth = [number % 3 for number in range(30)]
    right = torch.nn.functional.one_hot(torch.tensor(truth), 3).double() * 2
    sure = judged(right, truth)
    probabilities = sure.calibration.probabilities(right[0].tolist())
    assert 0.9 < max(probabilities) < 0.995
    assert [each.confidence for each in sure.thresholds] == [0.0]


def test_the_report_of_one_row_can_be_stored() -> None:
    one = judged(*decided(1, sharpness=1.0))
    assert msgspec.json.decode(msgspec.json.encode(one), type=DecisionReport) == one
    lines = "\n".join(decision_lines(one))
    assert "inf" not in lines and "are calibrated" not in lines and "-" not in lines


def test_rows_are_judged_by_fits_to_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many options as rows can be fitted to, a bias seems to help the rows that it was fitted on."""
    draw = torch.Generator().manual_seed(3)
    scores = 0.1 * torch.randn(60, 24, generator=draw, dtype=torch.float64)
    truth = (torch.randint(24, (60,), generator=draw) ** 2 // 24).tolist()
    decision = Decision(options=tuple(map(str, range(24))))

    def report() -> DecisionReport:
        return calibrate(decision, scores.tolist(), scores.tolist(), truth)[0]

    honest = report()

    def on_its_own_rows(fitter: Any, scores: Tensor, truth: Tensor) -> Tensor:
        return fitter(scores, truth).logs(scores)  # type: ignore[no-any-return]

    monkeypatch.setattr(calibration, "_cross_fitted", on_its_own_rows)
    planted = report()
    assert planted.calibration.bias
    assert planted.after.log_loss.value < honest.after.log_loss.value - 0.1


def test_thresholds_decide_rows_they_were_not_chosen_on() -> None:
    scores, truth = decided(1000, sharpness=1.0, seed=5)
    report = judged(scores, truth)
    assert [each.target for each in report.thresholds] == sorted(each.target for each in report.thresholds)
    for each in report.thresholds:
        assert each.right / each.rows > each.target - 0.04
        assert each.rows < 1000
    lines = [line for line in decision_lines(report) if line.startswith("Let the model")]
    assert len(lines) == len(report.thresholds) > 1


def test_a_higher_threshold_is_listed_only_if_it_decides_better() -> None:
    shares = [each.right / each.rows for each in judged(*decided(160, sharpness=1.0, seed=2)).thresholds]
    assert len(shares) > 1 and shares == sorted(set(shares))


def test_a_threshold_takes_all_rows_of_one_confidence() -> None:
    """Three texts that many rows repeat: the surest are all right, the next 5 of 20, the last 10 of 20.

    A part of the second would pass for 80 % right, with the first.
    """
    confidence = torch.tensor([0.9] * 20 + [0.7] * 20 + [0.5] * 20, dtype=torch.float64)
    scores = torch.stack([confidence, 1 - confidence, torch.full_like(confidence, 1e-6)], dim=1).log()
    truth = [0] * 20 + [0] * 5 + [1] * 15 + [0] * 10 + [1] * 10
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    report = judged(scores[order], [truth[row] for row in order])
    assert [(each.rows, each.right) for each in report.thresholds] == [(20, 20)]
    probabilities = [report.calibration.probabilities(row) for row in scores[[0, 20]].tolist()]
    assert max(probabilities[1]) < report.thresholds[0].confidence <= max(probabilities[0])


@pytest.mark.parametrize(
    ("lowest", "next_lower", "printed"),
    [
        (0.8349, 0.71, "0.83"),
        (0.8349, 0.832, "0.834"),
        (0.9962, 0.9958, "0.996"),
        (0.9999997, 0.9999, "0.99999"),
        (1.0, 0.8, "0.99"),
    ],
)
def test_a_printed_threshold_separates_the_rows_that_it_was_chosen_for(
    lowest: float, next_lower: float, printed: str
) -> None:
    confidence = torch.tensor([next_lower, lowest] * 20, dtype=torch.float64)
    threshold = calibration._threshold(confidence, confidence == lowest, 0.9)
    assert threshold is not None and next_lower < threshold <= lowest
    sentence = threshold_sentence(Threshold(0.9, threshold, 20, 20), 40)
    assert f"above {printed}:" in sentence and float(printed) == threshold


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = torch.tensor([True, True, False, False, True, False])
    assert calibration_error(confidence, right) == pytest.approx((4 * 0.45 + 2 * 0.05) / 6)


def test_fields_of_objects_are_judged_by_themselves() -> None:
    decision = Decision(
        options=('{"kind": "x", "urgent": true}', '{"kind": "x", "urgent": false}'), fields=("kind", "urgent")
    )
    scores = [[0.0, -3.0], [0.0, -3.0], [-3.0, 0.0]]
    report, chosen = calibrate(decision, scores, scores, [0, 1, 1])
    assert chosen == [0, 0, 1]
    assert [(each.field, each.accuracy.value) for each in report.fields] == [
        ("kind", 1.0),
        ("urgent", pytest.approx(2 / 3)),
    ]
