"""The event log of a run: appended lines, torn ends, and readers of it."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from qlora_tui.runs import event_log
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import (
    LONGEST_LINE_BYTES,
    EventTail,
    EventWriter,
    events_and_damage,
    events_backwards,
    last_event,
    sample_events,
)
from qlora_tui.runs.events import (
    CheckpointSaved,
    Evaluated,
    Finished,
    Queued,
    SampleGenerated,
    Step,
    StepVerified,
    encode,
)
from qlora_tui.runs.view import RunView
from tests.support.step_events import a_step


def test_what_is_written_is_read_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    assert tail.poll() == []
    with EventWriter(path) as log:
        log.append(a_step(1))
        assert tail.poll() == [a_step(1)]
        log.append(a_step(2))
        log.append(a_step(3))
    assert tail.poll() == [a_step(2), a_step(3)]
    assert tail.poll() == []


def test_a_torn_last_line_is_ignored_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    line = encode(a_step(2))
    path.write_bytes(encode(a_step(1)) + line[:20])
    tail = EventTail(path)
    assert tail.poll() == [a_step(1)]
    with path.open("ab") as file:
        file.write(line[20:])
    assert tail.poll() == [a_step(2)]


def test_the_next_writer_mends_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(encode(a_step(1)) + b'{"event":"step","at"')
    with EventWriter(path) as log:
        log.append(a_step(2))
    assert list(EventTail(path).drain()) == [a_step(1), a_step(2)]


def test_a_file_that_is_one_torn_line_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"x" * 10_000)
    with EventWriter(path) as log:
        log.append(a_step(1))
    assert list(EventTail(path).drain()) == [a_step(1)]


def test_lines_of_another_version_are_counted_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event":"teleported","at":1}\nnot json\n' + encode(a_step(1)))
    tail = EventTail(path)
    assert list(tail.drain()) == [a_step(1)]
    assert tail.unknown == 2


def test_a_line_longer_than_a_read_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_tui.runs.event_log._READ_BYTES", 100)
    path = tmp_path / "events.jsonl"
    long = CheckpointSaved(at=1.0, step=1, folder="f" * 5000)
    path.write_bytes(encode(long))
    tail = EventTail(path)
    assert tail.poll() == [long]
    with path.open("ab") as file:
        file.write(encode(a_step(2)))
    assert list(tail.drain()) == [a_step(2)]


@pytest.mark.slow
def test_a_long_run_is_gone_through_without_holding_it_all(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(encode(a_step(number)) for number in range(40_000)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in EventTail(path).drain()) == 40_000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size
    finally:
        tracemalloc.stop()


def test_the_last_event_is_found_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert last_event(path) is None
    end = Finished(at=9.0, step=3000, seconds=10.0, tokens_per_s=100.0)
    path.write_bytes(b"".join(encode(a_step(n)) for n in range(3000)) + encode(end) + b'{"torn')
    assert last_event(path) == end


def test_the_last_event_is_read_before_a_very_long_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(encode(a_step(1)) + b"y" * 200_000 + b"\n")
    assert last_event(path) == a_step(1)


def test_events_are_read_backwards_across_reads_and_long_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as log:
        for step in range(1, 3000):
            log.append(a_step(step))
        log.append(SampleGenerated(at=1.0, step=3000, prompt="p", answer="x" * 300_000))
        log.append(a_step(3001))
        begin = path.stat().st_size
        for step in range(3002, 3010):
            log.append(a_step(step))
    with path.open("ab") as file:
        file.write(b'{"event": "torn')
    forwards = list(EventTail(path).drain())
    assert len(forwards) == 3009
    assert list(events_backwards(path)) == forwards[::-1]
    assert list(events_backwards(path, begin)) == forwards[:-9:-1]


def hole(path: Path, size: int) -> None:
    """Add zeros that take no space, as a power cut leaves them."""
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + size)


@pytest.mark.slow
def test_a_large_hole_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(encode(a_step(1)))
    hole(path, 4 * LONGEST_LINE_BYTES)
    torn = list(events_and_damage(path))
    with path.open("ab") as file:
        file.write(encode(a_step(2)) + encode(a_step(3)))
    hole(path, 1 << 29)
    tracemalloc.start()
    assert [is_whole for _, is_whole in torn] == [True, False]
    assert [is_whole for _, is_whole in events_and_damage(path)] == [True, False, True, False]
    assert list(EventTail(path).drain()) == [a_step(1), a_step(3)]
    assert list(events_backwards(path)) == [a_step(3), a_step(1)]
    assert sample_events(path, 64).events[0] == a_step(1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * LONGEST_LINE_BYTES


def test_an_event_after_a_partially_written_hole_is_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(encode(a_step(1)))
    hole(path, 2 * LONGEST_LINE_BYTES)
    tail = EventTail(path)
    assert list(tail.drain()) == [a_step(1)]
    with path.open("ab") as file:
        file.write(b"\n" + encode(a_step(2)))
    assert list(tail.drain()) == [a_step(2)] and tail.unknown == 1


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
    monkeypatch.setattr(event_log, "_MAX_EACH", 100)
    monkeypatch.setattr(event_log, "_READ_BYTES", 1 << 16)
    with run.events_path.open("ab") as file:
        file.write(line * 40_000 + encode(Evaluated(at=1.0, step=1, loss=2.0)) + line * 40_000)
    sampled = sample_events(run.events_path, 50)
    assert 100 < sampled.unknown < 200
    assert [type(event) for event in sampled.events] == [Queued, Evaluated]


def test_any_number_of_one_kind_is_sampled(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "_MAX_EACH", 100)
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
