"""What the Train screen holds of a run: every step of a short one, a sample of a long one."""

from __future__ import annotations

import pytest

from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Finished, Health, Started
from qlora_tui.tui.screens.train import run_follower
from qlora_tui.tui.screens.train.run_follower import RunFollower
from screenshots.recorded_runs import recorded_run
from tests.tui.fake_runs import BEGAN, FakeRun, write_fake_run
from tests.tui.run_events import health_event, step_event


def test_a_resumed_run_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_fake_run(FakeRun(steps=100, state="paused"))
    follower = RunFollower(run)
    follower.poll()
    monkeypatch.setattr(RunFollower, "_open", lambda self: pytest.fail("it was read again"))
    with EventWriter(run.events_path) as log:
        log.append(Started(at=BEGAN + 500, attempt=2, pid=1, resumed_from_step=100))
        log.append(step_event(101))
    assert len(follower.poll().envelopes.loss.xs) == 101


def test_a_followed_long_run_is_drawn_like_an_opened_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_follower, "LONG_BYTES", 1 << 20)
    monkeypatch.setattr(run_follower, "_SAMPLE_STEPS", 100)
    run = write_fake_run(FakeRun(steps=10, total=200_000))
    follower = RunFollower(run)
    with EventWriter(run.events_path) as log:
        for step in range(11, 20_001):
            log.append(step_event(step))
        assert follower.poll().step_stride > 50
        for step in range(20_001, 24_001):
            log.append(step_event(step))
            if step % 100 == 0:
                if step == 22_000:
                    log.append(health_event("plateau", "seen on the way"))
                picture = follower.poll()
                xs = picture.envelopes.loss.xs
                assert picture.step == step
                assert 0 <= step - xs[-1] < picture.step_stride
                assert 0.4 < len([x for x in xs if x < step / 2]) / len(xs) < 0.6
    texts = [entry.text for entry in picture.entries]
    assert len(texts) == len(set(texts)) and sum("seen on the way" in text for text in texts) == 1


def test_output_goes_on_after_a_line_longer_than_one_read() -> None:
    run = write_fake_run(FakeRun(steps=10))
    follower = RunFollower(run)
    follower.poll()
    bar = "".join(f"\rloading {n:,} of 99,999" for n in range(100_000))
    with run.log_path.open("a") as log:
        log.write(f"{bar}\n{'x' * 1_000_000}\nafter\n")
    follower.poll()
    *_, progress, long, last = [entry.text for entry in follower.poll().output]
    assert (progress, last) == ("loading 99,999 of 99,999", "after")
    assert 0 < len(long) < 20_000


@pytest.mark.slow
def test_hundreds_of_thousands_of_steps_are_held_as_a_sample() -> None:
    run = write_fake_run(FakeRun(steps=10, total=200_000))
    with EventWriter(run.events_path) as log:
        for step in range(11, 60_001):
            log.append(step_event(step, loss=None if step == 30_000 else 2.0))
        log.append(Health(at=BEGAN, kind="nan_loss", severity="error", evidence="NaN.", remedy="Stop."))
    follower = RunFollower(run)
    picture = follower.poll()
    assert picture.step == 60_000
    assert picture.step_stride > 1
    assert any(picture.envelopes.loss.broken)
    assert len(picture.health) == 1
    with EventWriter(run.events_path) as log:
        log.append(step_event(60_001))
    assert follower.poll().step == 60_001


def test_a_run_watched_for_weeks_is_complete_in_little_memory() -> None:
    run = write_fake_run(FakeRun(steps=10, total=200_000))
    follower = RunFollower(run)
    with EventWriter(run.events_path) as log:
        for step in range(11, 12_001):
            log.append(step_event(step, loss=None if step == 20 else 90.0 if step == 700 else 2.0))
            if step % 500 == 0:
                picture = follower.poll()
                assert picture.step == step
                assert len(picture.view.series) <= 100
    loss = picture.envelopes.loss
    assert picture.step_stride == 1
    assert len(loss.xs) <= 641
    assert loss.high == 90.0 and 690 < loss.xs[loss.highs.index(90.0)] < 720
    assert any(loss.broken)
    assert loss.xs[-1] == 12_000
    follower.from_step = 11_900.0
    assert follower.poll().envelopes.loss.xs == tuple(range(11_900, 12_001))


def test_every_step_of_a_recorded_real_run_is_there_once() -> None:
    picture = RunFollower(recorded_run()).poll()
    assert picture.status.state == "finished"
    assert list(picture.envelopes.loss.xs) == list(range(1, 82))
    assert picture.best is not None and picture.best.step in {e.step for e in picture.evaluations}
    assert isinstance(picture.view.ending, Finished)
    assert picture.seconds_trained == pytest.approx(picture.view.ending.seconds, abs=0.1)
    assert picture.samples and picture.entries and picture.output and picture.telemetry
