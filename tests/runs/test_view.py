from __future__ import annotations

import math

import pytest
from msgspec import structs

from qlora_tui.runs.describe import describe
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import (
    Evaluated,
    Failed,
    Finished,
    Paused,
    Queued,
    Started,
    Step,
    StepVerified,
)
from qlora_tui.runs.outcomes import record_outcome
from qlora_tui.runs.status import Status, read_status, write_status
from qlora_tui.runs.view import RunView
from tests.support.step_events import a_data_set


def a_step(number: int, loss: float | None = 2.0, *, at: float | None = None) -> Step:
    return Step(
        at=10.0 * number if at is None else at,
        step=number,
        epoch=number / 10,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=0.5,
        tokens=number * 100,
        tokens_per_s=10.0,
    )


DATA = a_data_set(samples=10)


def test_the_first_steps_check_says_whether_it_is_fine() -> None:
    checked = StepVerified(
        at=1.0,
        tokens=512,
        seconds=1.0,
        loss=2.5,
        reference_loss=2.5,
        gradient_difference=0.043,
        gradient_noise=0.051,
    )
    figures = "loss 2.500 versus 2.500; gradients differ by 4.3% (5.1% by rounding alone)"
    assert describe(checked) == f"first step matches transformers + peft: {figures}"
    replaced = structs.replace(checked, replaced=("the fused RMSNorm",))
    assert "the fused RMSNorm, which this run no longer uses; now they match" in describe(replaced)
    assert "the results may be wrong" in describe(structs.replace(checked, agrees=False))


def test_a_resumed_attempt_replaces_the_steps_it_does_again(run: RunDir) -> None:
    view = RunView(run)
    with EventWriter(run.events_path) as log:
        log.append(Started(at=0.0, attempt=1, pid=1))
        for number in range(1, 8):
            log.append(a_step(number, loss=1.0))
        log.append(Evaluated(at=70.0, step=7, loss=0.5))
        log.append(Failed(at=71.0, title="killed", what="by hand", kind="killed"))
        log.append(Queued(at=72.0))
        log.append(Started(at=73.0, attempt=2, pid=2, resumed_from_step=5))
    view.refresh()
    assert list(view.series.step) == [1, 2, 3, 4, 5]
    assert view.evaluations == []
    assert view.ending is None
    with EventWriter(run.events_path) as log:
        for number in range(6, 11):
            log.append(a_step(number, loss=3.0))
        log.append(Finished(at=101.0, step=10, seconds=1.0, tokens_per_s=1.0))
    view.refresh()
    assert list(view.series.step) == list(range(1, 11))
    assert list(view.series.loss) == [1.0] * 5 + [3.0] * 5
    assert view.attempt == 2
    assert isinstance(view.ending, Finished)


def test_a_loss_that_is_no_number_is_kept_as_nan(run: RunDir) -> None:
    view = RunView(run)
    with EventWriter(run.events_path) as log:
        log.append(a_step(1, loss=None))
    view.refresh()
    assert math.isnan(view.series.loss[0])


def test_the_time_left_follows_the_pace(run: RunDir) -> None:
    view = RunView(run)
    with EventWriter(run.events_path) as log:
        log.append(DATA)
        log.append(a_step(1))
    view.refresh()
    assert view.seconds_left is None
    with EventWriter(run.events_path) as log:
        log.append(a_step(2))
        log.append(a_step(4))
    view.refresh()
    assert view.seconds_left == 60.0


def test_the_time_left_counts_evaluations(run: RunDir) -> None:
    view = RunView(run)
    with EventWriter(run.events_path) as log:
        log.append(DATA)
        for number, at in ((1, 10.0), (2, 20.0), (3, 34.0)):
            log.append(a_step(number, at=at))
    view.refresh()
    assert view.seconds_left == 7 * 12.0


@pytest.mark.parametrize(("by", "left"), [(-3600.0, 40.0), (86_400.0, 80.0)])
def test_a_clock_change_during_a_run_distorts_no_duration(run: RunDir, by: float, left: float) -> None:
    view = RunView(run)
    with EventWriter(run.events_path) as log:
        log.append(DATA)
        for number in range(1, 7):
            log.append(a_step(number, at=10.0 * number + (by if number > 3 else 0.0)))
    view.refresh()
    assert view.seconds_left == left
    assert view.series.seconds() == 60.0


def test_a_night_between_two_attempts_is_no_training(run: RunDir) -> None:
    view = RunView(run)
    with EventWriter(run.events_path) as log:
        log.append(DATA)
        for number in (1, 2, 3):
            log.append(a_step(number))
        log.append(Paused(at=31.0, step=3))
        log.append(Started(at=30_000.0, attempt=2, pid=2, resumed_from_step=3))
        for number in (4, 5):
            log.append(a_step(number, at=30_000.0 + 10.0 * number))
    view.refresh()
    assert view.seconds_left == 100.0
    assert view.series.seconds() == 50.0


def test_the_best_validation_is_the_lowest_after_training_began(run: RunDir) -> None:
    view = RunView(run)
    with EventWriter(run.events_path) as log:
        for step, loss in ((0, 0.1), (5, 1.5), (10, 1.2), (15, None)):
            log.append(Evaluated(at=float(step), step=step, loss=loss))
    view.refresh()
    assert view.best is not None and view.best.step == 10


@pytest.mark.parametrize(("lowest", "to_beat"), [(9.38, 4.36), (4.1, None)])
def test_a_best_validation_must_beat_the_untrained_model(
    run: RunDir, lowest: float, to_beat: float | None
) -> None:
    view = RunView(run)
    with EventWriter(run.events_path) as log:
        for step, loss in ((0, 4.36), (5, 16.1), (10, lowest)):
            log.append(Evaluated(at=float(step), step=step, loss=loss, best=step == 5, before_training=4.36))
    view.refresh()
    assert view.loss_before_training == 4.36
    assert view.loss_to_beat == to_beat
    assert describe(view.evaluations[1], 10).endswith("lowest so far, but 4.360 before training")


def test_steps_missing_from_events_come_from_the_heartbeat(run: RunDir) -> None:
    with EventWriter(run.events_path) as log:
        log.append(Started(at=1.0, attempt=1, pid=1))
        log.append(a_step(10, loss=2.0))
    write_status(run, Status(state="running", at=105.0, step=13, loss=1.5))
    view = RunView(run)
    view.refresh()
    assert (view.step, view.loss) == (13, 1.5)
    # The next attempt has not had a heartbeat yet.
    with EventWriter(run.events_path) as log:
        log.append(Started(at=200.0, attempt=2, pid=2, resumed_from_step=10))
    view.refresh()
    assert (view.step, view.loss) == (10, 2.0)


def test_a_killed_runs_last_step_is_known_without_heartbeat(run: RunDir) -> None:
    with EventWriter(run.events_path) as log:
        log.append(DATA)
        for number in (6, 7):
            log.append(a_step(number, loss=float(number)))
    write_status(run, Status(state="running", at=60.0, step=6, total_steps=10, loss=6.0))
    record_outcome(run, Failed(at=71.0, title="killed", what="by hand", kind="killed"))
    status = read_status(run)
    assert (status.state, status.step, status.total_steps, status.loss) == ("failed", 7, 10, 7.0)


def test_the_best_evaluation_has_the_lowest_score_where_forgetting_counts(run: RunDir) -> None:
    with EventWriter(run.events_path) as log:
        for step, loss, score in ((5, 1.0, 1.1), (10, 0.8, 1.4), (15, 0.9, 1.3)):
            log.append(Evaluated(at=float(step), step=step, loss=loss, score=score))
    view = RunView(run)
    view.refresh()
    assert view.best is not None and view.best.step == 5
