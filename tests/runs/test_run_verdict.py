"""Whether a run worked, in one sentence, by what is known of it, and the warnings beside it."""

from __future__ import annotations

import time

import pytest

from qlora_tui.recipe.schema import Data, Lora, Preferences, Recipe
from qlora_tui.runs.describe import current_health
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import (
    Evaluated,
    Finished,
    Health,
    Started,
    ValidationCompared,
)
from qlora_tui.runs.run_summary import PreferenceAccuracy, RunEvidence, gather_evidence, judge_run, summarize
from qlora_tui.runs.task_metrics.answer_metrics import Metric, TaskRow, measure_answers
from qlora_tui.runs.task_metrics.task_evaluation import LossChange, TaskEvaluation
from qlora_tui.runs.view import RunView
from tests.support.step_events import a_data_set, a_step
from tests.support.task_evaluations import a_row, put_evaluation


def evaluation(change: LossChange) -> TaskEvaluation:
    return TaskEvaluation(
        run="", adapter="", max_new_tokens=1, validation_rows=0, metrics=(), loss=change, rows=()
    )


def loss(change: float, rows: int = 20) -> LossChange:
    """A loss of 2 that changes by ``change`` nats on each row, plus or minus 0.3."""
    before, spread = [2.0] * rows, [0.3 * (-1) ** number for number in range(rows)]
    return LossChange.of(before, [2 + change + each for each in spread], [1] * rows)


def answers(base: int, adapter: int, rows: int = 20) -> list[TaskRow]:
    """Answers of a base and an adapter that answer so many of the rows rightly."""
    rights = ["yes" if number % 2 else "no" for number in range(rows)]
    return [
        a_row(right, right if number < base else "?", right if number < adapter else "?", row=number)
        for number, right in enumerate(rights)
    ]


def accuracy(base: int, adapter: int, rows: int = 20) -> Metric:
    """Accuracy of a base and an adapter that answer so many of the rows rightly."""
    return measure_answers(answers(base, adapter, rows))[0]


@pytest.mark.parametrize(
    ("evidence", "outcome", "sentence"),
    [
        (
            RunEvidence(loss=loss(-0.8), forgetting=0.31, metric=accuracy(6, 18)),
            "better",
            "It learned: validation loss fell by 0.800 (95%: 0.669 to 0.931; 20 rows); "
            "forgetting 0.31 of 2; answers better: exact match 90%, base 30%.",
        ),
        (
            RunEvidence(loss=loss(-0.8), forgetting=2.4, forgot_much=True),
            "better",
            "It learned: validation loss fell by 0.800 (95%: 0.669 to 0.931; 20 rows); "
            "other abilities are at risk.",
        ),
        (
            RunEvidence(loss=loss(0.5)),
            "worse",
            "It got worse: validation loss rose by 0.500 (95%: 0.369 to 0.631; 20 rows).",
        ),
        (
            RunEvidence(loss=loss(-0.05)),
            "unclear",
            "Not enough evidence that it learned: validation loss changed by -0.050 "
            "(95%: -0.181 to +0.081; 20 rows).",
        ),
        (
            RunEvidence(loss=loss(-0.8), best_step=640),
            "better",
            "It learned: validation loss fell by 0.800 (95%: 0.669 to 0.931; 20 rows); "
            "best at step 640, worse since.",
        ),
        (
            RunEvidence(loss=loss(-0.8, rows=4)),
            "unclear",
            "Not enough evidence that it learned: only 4 rows compared.",
        ),
        (
            RunEvidence(loss=loss(-0.8), metric=accuracy(9, 10)),
            "better",
            "It learned: validation loss fell by 0.800 (95%: 0.669 to 0.931; 20 rows); "
            "answers not clearly better: exact match 50%, base 45% on 20 prompts.",
        ),
        (
            RunEvidence(loss=loss(-0.8), metric=accuracy(18, 6)),
            "worse",
            "It learned: validation loss fell by 0.800 (95%: 0.669 to 0.931; 20 rows); "
            "answers worse: exact match 30%, base 90%.",
        ),
        (
            RunEvidence(preferences=PreferenceAccuracy(0.9, 20, "pair", 0.5), loss=loss(0.5)),
            "better",
            "It learned: 90% of 20 validation pairs right, 50% by chance.",
        ),
        (
            RunEvidence(preferences=PreferenceAccuracy(0.9, 20, "answer", 0.8)),
            "unclear",
            "Not enough evidence that it learned: 90% of 20 validation answers right, 80% by chance.",
        ),
        (
            RunEvidence(preferences=PreferenceAccuracy(0.75, 20, "pair", 0.5, is_measured=True)),
            "unclear",
            "Not enough evidence that it learned: 75% of 20 validation pairs right, 50% before.",
        ),
        (
            RunEvidence(preferences=PreferenceAccuracy(1.0, 5, "pair", 0.5)),
            "unclear",
            "Not enough evidence that it learned: 100% of 5 validation pairs right, 50% by chance.",
        ),
        (
            RunEvidence(preferences=PreferenceAccuracy(0.1, 20, "pair", 0.5)),
            "worse",
            "It got worse: 10% of 20 validation pairs right, 50% by chance.",
        ),
        (RunEvidence(), "unclear", "Not enough evidence that it learned: no validation data."),
        (
            RunEvidence(losses=(2.5, 1.5)),
            "unclear",
            "Validation loss fell from 2.500 to 1.500.",
        ),
        (
            RunEvidence(losses=(2.5, 2.5)),
            "unclear",
            "Not enough evidence that it learned: validation loss 2.500 → 2.500.",
        ),
    ],
)
def test_the_verdict_says_what_the_evidence_allows(
    evidence: RunEvidence, outcome: str, sentence: str
) -> None:
    verdict = judge_run(evidence)
    assert (verdict.outcome, verdict.sentence) == (outcome, sentence)
    assert verdict.has_answers == (evidence.metric is not None)
    assert verdict.lacks_rows == sentence.endswith(("to 1.500.", "2.500 → 2.500."))


def test_a_summary_has_the_verdict_of_its_run(run: RunDir) -> None:
    now = time.time()
    compared = ValidationCompared(at=now, rows=9, before=2.0, after=1.0, low=-1.2, high=-0.8)
    with EventWriter(run.events_path) as log:
        log.append(Started(at=now, attempt=1, pid=1))
        log.append(a_step(at=now, loss=1.0))
        log.append(Evaluated(at=now, step=1, loss=1.0, before_training=2.0, forgetting=2.5))
        log.append(Health(at=now, kind="forgetting", severity="warning", evidence="", remedy=""))
        assert summarize(run).verdict is None
        log.append(compared)
        log.append(Finished(at=now, step=1, seconds=1.0, tokens_per_s=9.0))
    verdict = summarize(run).verdict
    assert verdict is not None
    learned, changed = verdict.sentence.rsplit("; ", 1)
    assert learned == "It learned: validation loss fell by 1.000 (95%: 0.800 to 1.200; 9 rows)"
    assert changed == "other abilities are at risk."
    assert verdict.cautions == (changed.removesuffix("."),)
    put_evaluation(run, answers(6, 18), loss(0.5))
    verdict = summarize(run).verdict
    assert verdict is not None and verdict.sentence.endswith("answers better: exact match 90%, base 30%.")


def test_a_clear_rise_after_the_best_loss_is_part_of_the_evidence(run: RunDir) -> None:
    view, best_steps = RunView(run), []
    with EventWriter(run.events_path) as log:
        for step, loss_then in ((0, 2.0), (5, 1.5), (10, 1.4), (15, 1.405), (20, 1.5)):
            log.append(Evaluated(at=1.0, step=step, loss=loss_then))
            view.refresh()
            best_steps.append(gather_evidence(view, None, None).best_step)
    assert best_steps == [None, None, None, None, 10]


def test_a_warning_of_forgetting_has_its_latest_value_and_names_settings(run: RunDir) -> None:
    remedy = "Lower training.learning_rate, or Rank (lora.rank), as with --set lora.rank=8."
    with EventWriter(run.events_path) as log:
        for step, divergence in ((10, 1.0), (20, 2.1), (30, 2.6)):
            log.append(Evaluated(at=1.0, step=step, loss=1.0, forgetting=divergence, general_turn_ends=0.0))
            if step == 20:
                log.append(
                    Health(at=1.0, step=20, kind="forgetting", severity="warning", evidence="", remedy=remedy)
                )
    view = RunView(run)
    view.refresh()
    (warning,) = current_health(view)
    assert warning.evidence.startswith("General answers no longer end. Forgetting 2.6 of 2: ")
    assert "at step 30 (2.1 at step 20)" in warning.evidence
    assert warning.remedy == "Lower Learning rate, or Rank, as with --set lora.rank=8."


@pytest.mark.parametrize(
    ("method", "before", "expected"),
    [
        ("dpo", 0.0, PreferenceAccuracy(0.9, 20, "pair", 0.5)),
        ("kto", 0.3, PreferenceAccuracy(0.9, 20, "answer", 0.7)),
        ("simpo", 0.3, PreferenceAccuracy(0.9, 20, "pair", 0.3, is_measured=True)),
        ("orpo", 0.3, None),
    ],
)
def test_a_preference_run_is_judged_by_its_comparisons(
    run: RunDir, method: Preferences, before: float, expected: PreferenceAccuracy | None
) -> None:
    now = time.time()
    with EventWriter(run.events_path) as log:
        log.append(a_data_set(validation_samples=20))
        log.append(Evaluated(at=now, step=0, loss=1.0, reward_accuracy=before))
        log.append(Evaluated(at=now, step=9, loss=1.0, reward_accuracy=0.9))
    view = RunView(run)
    view.refresh()
    recipe = Recipe(data=Data(preferences=method))
    evidence = gather_evidence(view, evaluation(loss(0.5)), recipe)
    assert evidence.preferences == expected and (evidence.loss is None) == (method != "orpo")
    assert gather_evidence(view, None, None).preferences is None
    continued = Recipe(lora=Lora(init_from="owls"))
    assert gather_evidence(view, evaluation(loss(0.5)), continued).loss is None


@pytest.mark.parametrize("method", ["refuse", "dpo", "kto"])
def test_a_measurement_before_training_alone_is_no_verdict(run: RunDir, method: Preferences) -> None:
    recipe = Recipe(data=Data(preferences=method))
    with EventWriter(run.events_path) as log:
        log.append(a_data_set(validation_samples=20))
        log.append(Evaluated(at=1.0, step=0, loss=6.26, reward_accuracy=0.0, forgetting=0.0))
    view = RunView(run)
    view.refresh()
    verdict = judge_run(gather_evidence(view, None, recipe))
    expected = "Too early to tell: validation was measured only before training."
    assert verdict.sentence == expected


@pytest.mark.parametrize(("first_step", "rows"), [(3, 20), (0, 0)])
def test_comparisons_without_a_start_or_rows_are_no_evidence(run: RunDir, first_step: int, rows: int) -> None:
    with EventWriter(run.events_path) as log:
        log.append(a_data_set(validation_samples=rows))
        log.append(Evaluated(at=1.0, step=first_step, loss=1.0, reward_accuracy=0.5))
        log.append(Evaluated(at=1.0, step=9, loss=1.0, reward_accuracy=0.9))
    view = RunView(run)
    view.refresh()
    assert gather_evidence(view, None, Recipe(data=Data(preferences="simpo"))).preferences is None
