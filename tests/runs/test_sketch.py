from __future__ import annotations

import os

import pytest

from qlora_tui.runs import event_sampling
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter, events_and_damage, events_backwards
from qlora_tui.runs.event_sampling import sample_events
from qlora_tui.runs.events import Evaluated, Finished, Queued, Step, StepVerified, encode
from qlora_tui.runs.view import RunView
from tests.runs.test_view import a_step


def test_a_short_run_is_read_whole(run: RunDir) -> None:
    with EventWriter(run.events_path) as log:
        for number in range(1, 101):
            log.append(a_step(number))
    steps = [event.step for event in sample_events(run.events_path, 10).events if isinstance(event, Step)]
    assert steps == list(range(1, 101))


def test_a_long_sketch_keeps_every_event_but_steps(run: RunDir) -> None:
    with EventWriter(run.events_path) as log:
        for number in range(1, 20_001):
            log.append(a_step(number))
            if number % 500 == 0:
                log.append(Evaluated(at=1.0, step=number, loss=2.0))
    events = sample_events(run.events_path, 50).events
    steps = [event.step for event in events if isinstance(event, Step)]
    assert 45 <= len(steps) <= 60
    assert steps == sorted(steps)
    assert [e.step for e in events if isinstance(e, Evaluated)] == list(range(500, 20_001, 500))
    assert isinstance(events[0], Queued)
    with EventWriter(run.events_path) as log:
        log.append(a_step(20_001))
        log.append(Finished(at=2.0, step=20_001, seconds=1.0, tokens_per_s=1.0))
        log.append(a_step(20_002))
    last = sample_events(run.events_path, 50).events[-1]
    assert isinstance(last, Step) and last.step == 20_002


def test_facts_of_a_long_run_are_no_samples(run: RunDir) -> None:
    with EventWriter(run.events_path) as log:
        for number in range(1, 10_001):
            log.append(a_step(number))
        log.append(StepVerified(at=1.0, tokens=1, seconds=1.0, replaced=("lora",)))
        for number in range(10_001, 20_001):
            log.append(a_step(number))
    with run.events_path.open("ab") as file:
        file.write(b'{"event":"stepped","at":1.0}\n{"event":"step","at":1.0}\n')
    sampled = sample_events(run.events_path, 50)
    assert sampled.unknown == 2, "the last line, and one of another version"
    view, _ = RunView.from_sample(run, 50)
    assert view.verified is not None and view.verified.replaced == ("lora",)


@pytest.mark.parametrize("line", [b"garbage\n", b'{"event":"unheard","of":1}\n'])
def test_any_number_of_unknown_lines_is_sampled(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, line: bytes
) -> None:
    monkeypatch.setattr(event_sampling, "_MAX_EACH", 100)
    monkeypatch.setattr(event_sampling, "_CHUNK_BYTES", 1 << 16)
    with run.events_path.open("ab") as file:
        file.write(line * 40_000 + encode(Evaluated(at=1.0, step=1, loss=2.0)) + line * 40_000)
    sampled = sample_events(run.events_path, 50)
    assert 100 < sampled.unknown < 200
    assert [type(event) for event in sampled.events] == [Queued, Evaluated]


def test_any_number_of_one_kind_is_sampled(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_sampling, "_MAX_EACH", 100)
    with EventWriter(run.events_path) as log:
        for number in range(1, 10_001):
            log.append(Evaluated(at=1.0, step=number, loss=2.0))
        log.append(Finished(at=2.0, step=10_000, seconds=1.0, tokens_per_s=1.0))
    events = sample_events(run.events_path, 50).events
    evaluated = [event.step for event in events if isinstance(event, Evaluated)]
    assert 100 < len(evaluated) < 200 and evaluated[-1] == 10_000 and evaluated == sorted(evaluated)
    assert isinstance(events[0], Queued) and isinstance(events[-1], Finished)


def test_a_hole_of_terabytes_is_passed_at_once(run: RunDir) -> None:
    with EventWriter(run.events_path) as log:
        log.append(a_step(1))
    end = run.events_path.stat().st_size + (3 << 40)
    try:
        os.truncate(run.events_path, end)
    except OSError:
        pytest.skip("the file system has no files of this size")
    with run.events_path.open("ab") as file:
        file.write(b"\n")
    view = RunView(run)
    assert len(view.refresh()) == 2
    with run.events_path.open("ab") as file:
        file.write(encode(a_step(2)))
    assert view.refresh() == [a_step(2)]
    sampled, _ = RunView.from_sample(run, 50)
    assert sampled.step == 2
    backwards = list(events_backwards(run.events_path))
    assert backwards[:2] == [a_step(2), a_step(1)] and isinstance(backwards[2], Queued)
    assert sum(is_event for _, is_event in events_and_damage(run.events_path)) == 3
    os.truncate(run.events_path, end)
    with EventWriter(run.events_path) as log:
        log.append(a_step(2))
    assert run.events_path.stat().st_size < 1 << 20


def test_a_view_made_of_a_sketch_goes_on_from_there(run: RunDir) -> None:
    with EventWriter(run.events_path) as log:
        for number in range(1, 20_001):
            log.append(a_step(number))
        log.append(Evaluated(at=1.0, step=20_000, loss=2.0))
    view, _ = RunView.from_sample(run, 50)
    assert view.step == 20_000
    assert view.best is not None and view.best.step == 20_000
    assert len(view.series) < 100
    with EventWriter(run.events_path) as log:
        log.append(a_step(20_001))
    view.refresh()
    assert list(view.series.step)[-2:] == [20_000, 20_001]


def test_a_sketch_keeps_the_steps_that_are_not_numbers(run: RunDir) -> None:
    with EventWriter(run.events_path) as log:
        for number in range(1, 20_001):
            log.append(a_step(number, loss=None if number in (7_001, 7_003) else 1.0))
    events = sample_events(run.events_path, 50).events
    broken = [event.step for event in events if isinstance(event, Step) and event.loss is None]
    assert broken == [7_001, 7_003]


def test_a_torn_last_line_hides_not_the_last_step(run: RunDir) -> None:
    with EventWriter(run.events_path) as log:
        for number in range(1, 20_002):
            log.append(a_step(number))
    with run.events_path.open("ab") as file:
        file.write(b'{"event":"step","at":1.0,"st')
    view, _ = RunView.from_sample(run, 50)
    assert view.step == 20_001
